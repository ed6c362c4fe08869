"""What started this process: its number among those that train together, and its end with the launcher's.

torchrun's variables are understood as they are. Those of Slurm, Open MPI, MPICH and MVAPICH are translated into them,
or refused where something is missing: processes that take themselves to be alone would each train the whole run.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from megatron_ext.errors import EnvironmentFault
from megatron_ext.locks import release_all, start_of_process, state_of_process

GRACE = 30.0
"""Seconds a rank has to save once its launcher is gone."""
JOB_START = "MEGATRON_EXT_JOB_START"
"""When the launcher was started, in seconds since 1970; told to all ranks, also those it starts again."""
LAUNCHER = "MEGATRON_EXT_LAUNCHER"
"""The process of our launcher and when it began, for ranks that come to look when it is gone."""
STOP_FILE = "MEGATRON_EXT_STOP_FILE"
"""Where a rank says to its launcher that the run was stopped, with the exit code."""
_BEGAN = time.time()
_PR_SET_PDEATHSIG = 1
_LOOK = 0.5


@dataclass(frozen=True)
class _Family:
    """The variables of one launcher: number of processes, this one's number, and its number on this host."""

    name: str
    size: str
    rank: str
    local_rank: str
    local_size: str | None = None


# What runs inside another comes first: mpirun is itself started through srun within a Slurm job.
_FAMILIES = (
    _Family(
        "Open MPI",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Family("MVAPICH", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    _Family("mpirun", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    _Family("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
)
_TORCHRUN = ("RANK", "WORLD_SIZE")
_WAY_OUT = "start with torchrun (launch/torchrun.sh), on several nodes with launch/slurm.sbatch"


def launched_world_size() -> int:
    """How many processes train together: 1 without a launcher. EnvironmentFault as in `adopt_launcher`."""
    adopt_launcher()
    return _number("WORLD_SIZE", 1)


def launched_rank() -> int:
    """This process's number among those that train together: 0 without a launcher."""
    adopt_launcher()
    return _number("RANK", 0)


def adopt_launcher() -> None:
    """Express in torchrun's variables what another launcher says of this process.

    Raises:
        EnvironmentFault: it started several processes, but not all is known that they need to find each other.
    """
    if any(name in os.environ for name in _TORCHRUN):
        return
    family = next((family for family in _FAMILIES if family.size in os.environ), None)
    if family is None:
        if "PMIX_RANK" in os.environ:
            raise EnvironmentFault(f"PMIX_RANK is set, but not how many processes there are: {_WAY_OUT}")
        return
    size = _number(family.size, 1)
    if size == 1:
        return
    if family.local_rank in os.environ:
        os.environ.setdefault("LOCAL_RANK", str(_number(family.local_rank, 0)))
    needed = (family.rank, family.local_rank, "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise EnvironmentFault(
            f"{family.name} started {size} processes ({family.size} = {size}), but {', '.join(missing)} not set, "
            f"without which they cannot train together: {_WAY_OUT}; or set what is missing (MASTER_ADDR: the host of "
            f"process 0, MASTER_PORT: a free port there). To train in one process alone, unset {family.size}"
        )
    rank = _number(family.rank, 0)
    if rank >= size:
        raise EnvironmentFault(f"{family.rank} = {rank}, {family.size} = {size}: there is no such process")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    if family.local_size is not None and family.local_size in os.environ:
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ[family.local_size])


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise EnvironmentFault(f"{name} = {text!r}: expected a whole number")
    return int(text)


def attempt() -> str:
    """Names the round of ranks that a launcher has started, in its store.

    The launcher's store may have been that of earlier ranks; one of rank 0's own has not. (Each node counts its own
    restarts: the number is no name for a round that all of them know.)
    """
    number = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if keeps_store() else "0"
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{number}"


def keeps_store() -> bool:
    """Whether the launcher keeps the store through which its ranks meet; where it does not, rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def job_start() -> float:
    """When this job began, in seconds since 1970: its launcher, or this process without ours."""
    text = os.environ.get(JOB_START, "")
    return float(text) if text.replace(".", "", 1).isdecimal() else _BEGAN


def exit_stopped(code: int) -> NoReturn:
    """End with `code` a rank of a run that was stopped and saved. It is no failure that is to be started again.

    torchrun takes any code but 0 for one. So our launcher is told the code, and ends with it.
    """
    if path := os.environ.get(STOP_FILE):
        Path(path).write_text(str(code))
        sys.exit(0)
    sys.exit(code)


def failure_file(stop_file: str | Path) -> Path:
    """Stands beside `stop_file` where a rank has failed."""
    return Path(stop_file).with_suffix(".failed")


@contextlib.contextmanager
def noting_failure() -> Iterator[None]:
    """Tell our launcher where what is inside fails: told to stop meanwhile, it would say that the run was saved."""
    if not (path := os.environ.get(STOP_FILE)):
        yield
        return
    failure_file(path).unlink(missing_ok=True)  # of ranks that were started before
    try:
        yield
    except Exception:
        failure_file(path).touch()
        raise


def end_with_launcher() -> None:
    """Have this process end when torchrun does, however torchrun ends; does nothing without torchrun.

    It gets SIGTERM, upon which training saves, and half a minute later it ends in any case.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    # A store that went with torchrun is no news that fills the screen; read when torch is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    launcher = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    if is_launcher_gone():
        os.kill(os.getpid(), signal.SIGTERM)  # it went while this process imported: whose child it is now says nothing
    threading.Thread(target=_follow, args=(launcher,), name="launcher", daemon=True).start()


_interrupted = threading.Event()


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt where there was one: imports that go on whatever they meet take it for a fault of theirs.

    For waits that may never end: other ranks have ended by it.
    """
    if _interrupted.is_set():
        raise KeyboardInterrupt


def name_launcher() -> None:
    """Let the ranks that this process starts know that it is their launcher."""
    os.environ[LAUNCHER] = f"{os.getpid()} {start_of_process(os.getpid()) or ''}"


def is_launcher_gone() -> bool:
    """Whether our launcher, which has named itself, runs no longer; False where this system does not show processes."""
    pid, _, started = os.environ.get(LAUNCHER, "").partition(" ")
    return bool(started) and state_of_process(int(pid), started) is None


def _follow(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_LOOK)
    os.kill(os.getpid(), signal.SIGTERM)  # where the kernel has not
    time.sleep(GRACE)
    release_all()
    os._exit(128 + signal.SIGTERM)
