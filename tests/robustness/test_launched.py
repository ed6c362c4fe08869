"""Runs under real launchers: two of them in one directory, one whose launcher is killed, one started by mpirun."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.checkpoint.find import require_checkpoint
from megatron_ext.checkpoint.state_file import read_state
from megatron_ext.locks import exclusive
from megatron_ext.monitoring.metrics_file import read_metrics
from megatron_ext.testing.ports import free_port
from tests.support.commands import TOOLS, command
from tests.support.waiting import HANGS, ended_at_last, ranks_of, wait_for_ends, wait_until
from tests.support.workspace import reported_losses


def test_a_second_run_is_refused_and_ranks_save_and_end_with_their_launcher(work: Path, tmp_path: Path) -> None:
    directory = work / "orphans"
    options = [str(work / "run.yaml"), f"checkpoint.directory={directory}", "train.train_iters=100000"]
    options += ["checkpoint.save_interval=null"]
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            + [str(TOOLS / "train.py"), *options],
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    metrics = directory / "metrics.jsonl"
    with ended_at_last(launcher):  # and with it its ranks
        wait_until(lambda: metrics.is_file() and len(read_metrics(metrics)) > 2, errors.read_text, launcher)
        ranks = list(ranks_of(launcher).values())
        second = command(TOOLS / "train.py", *options)
        assert second.returncode == 2
        assert f"error: {directory} is being written by training on {socket.gethostname()} (process " in second.stderr
        assert any(f"(process {rank.pid}, since 20" in second.stderr for rank in ranks)
        assert "Traceback" not in second.stderr
    assert launcher.returncode == -signal.SIGKILL, errors.read_text()
    wait_for_ends(ranks)
    steps = read_metrics(metrics)[-1]["iteration"]
    assert read_state(require_checkpoint(directory)).iteration == steps, errors.read_text()
    with exclusive(directory, "testing"):
        print(f"ranks of a killed launcher saved step {steps} and ended")


@pytest.mark.parametrize("size", ["OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "PMI_SIZE"])
def test_processes_that_would_each_train_alone_are_refused(size: str, work: Path) -> None:
    process = command(TOOLS / "train.py", work / "run.yaml", f"checkpoint.directory={work / 'alone'}", **{size: "2"})
    assert process.returncode == 2
    assert f"started 2 processes ({size} = 2)" in process.stderr
    assert "launch/slurm.sbatch" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (work / "alone").exists()


def test_mpirun_with_an_address_trains_as_one_run(work: Path) -> None:
    directory = work / "mpirun"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"OMPI_COMM_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(TOOLS / "train.py"), str(work / "run.yaml"), f"checkpoint.directory={directory}"],
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    with ended_at_last(processes[0]), ended_at_last(processes[1]):
        for process in processes:
            _, errors = process.communicate(timeout=HANGS)
            assert process.returncode == 0, errors
    assert len(reported_losses(directory)) == 6
    assert [record["world_size"] for record in events(directory)] == [2]


def test_a_job_file_is_written_and_checked_where_no_slurm_answers(work: Path, tmp_path: Path) -> None:
    (tmp_path / "profile.yaml").write_text("scheduler: slurm\ngpus_per_node: 0\nprocesses_per_node: 1\n")
    (tmp_path / "slurm.conf").write_text("ClusterName=away\nSlurmctldHost=localhost\nSlurmctldPort=9\nNodeName=n1\n")
    why = "Slurm does not answer (scontrol ping: " if shutil.which("scontrol") else "there is no sbatch on this machine"
    run, directory = work / "run.yaml", tmp_path / "run"
    call = [run, f"checkpoint.directory={directory}", "--nodes", "1", "--profile", tmp_path / "profile.yaml"]
    conf = {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    written = command(TOOLS / "launch.py", *call, **conf)
    print(written.stdout, written.stderr)
    assert written.returncode == 0
    file = tmp_path / "run-job.sh"
    assert written.stdout.splitlines()[-1] == f"queue it with   sbatch {file} on a machine of the cluster"
    assert f"\nnot asked       {why}" in written.stdout
    refused = command(TOOLS / "launch.py", *call, "--submit", "--output", file, **conf)
    print(refused.stderr)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: --submit: {why}")
    assert refused.stderr.endswith(f"on a machine of the cluster, or once it answers: sbatch {file}\n")
    assert "#SBATCH" in file.read_text()


def events(directory: Path) -> list[dict[str, int]]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record.get("event") == "start"]
