"""A two-node Slurm on loopback, for one test run: its own munge key, daemons and configuration in one directory."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

from megatron_ext.testing.ports import free_port
from tests.support.waiting import HANGS, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo", "scontrol")

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
"""States that a job stays in; while it is queued again it passes through others."""

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=15
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool_%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd_%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
ReturnToService=2
SlurmdParameters=config_overrides
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
InactiveLimit=0
MessageTimeout=60
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs=4 RealMemory=2000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_2} CPUs=4 RealMemory=2000 State=UNKNOWN
PartitionName=tests Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def unavailable() -> str | None:
    """Why no Slurm can be started here; None if it can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "starting Slurm's daemons needs root"
    return None


class Cluster:
    """The daemons. Use as a context manager."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        with ExitStack() as failed:
            failed.callback(self.end)
            self._begin()
            failed.pop_all()
        return self

    def _begin(self) -> None:
        d = self.directory
        for name in ("state", "spool_n1", "spool_n2"):
            (d / name).mkdir()
        (d / "munge.key").write_bytes(secrets.token_bytes(1024))
        (d / "munge.key").chmod(0o600)
        host = socket.gethostname().split(".")[0]
        ports: list[int] = []
        while len(ports) < 3:
            ports += {free_port()}.difference(ports)
        named = dict(zip(("port", "port_1", "port_2"), ports, strict=True))
        (d / "slurm.conf").write_text(CONFIGURATION.format(host=host, directory=d, **named))
        files = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munge.seed",
        }
        self._start("munged", "--force", *(f"--{option}={d / name}" for option, name in files.items()))
        self._start("slurmctld", "-c", "-f", str(d / "slurm.conf"))
        for node in ("n1", "n2"):
            self._start("slurmd", "-N", node, "-f", str(d / "slurm.conf"))
        wait_until(self._are_idle, (d / "slurmctld.log").read_text)

    def _start(self, *command: str) -> None:
        subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=HANGS)

    def run(self, *command: str, **environment: str) -> str:
        """Run a Slurm client and return what it prints."""
        result = subprocess.run(
            command, env={**self.environment, **environment}, capture_output=True, text=True, timeout=HANGS
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def _are_idle(self) -> bool:
        return len(set(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split())) == 2

    def wait_for_job(self, job: str) -> str:
        """Wait until `job` has ended and return its state."""
        deadline = time.monotonic() + HANGS
        while time.monotonic() < deadline:
            fields = dict(f.split("=", 1) for f in self.run("scontrol", "show", "job", job).split() if "=" in f)
            if fields["JobState"] in ENDED:
                return fields["JobState"]
            if fields["JobState"] == "PENDING" and fields["Restarts"] != "0":
                # Slurm holds a job that is queued again back for two minutes. It may just have begun all the same.
                release = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
                subprocess.run(release, env=self.environment, check=False, capture_output=True, timeout=HANGS)
            time.sleep(1)
        self.run("scancel", job)
        raise AssertionError(f"job {job} did not end within {HANGS:.0f} s")

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """End the daemons that have begun."""
        for name in ("slurmd_n1.pid", "slurmd_n2.pid", "slurmctld.pid", "munged.pid"):
            pid_file = self.directory / name
            if pid_file.is_file():
                os.kill(int(pid_file.read_text()), signal.SIGTERM)
