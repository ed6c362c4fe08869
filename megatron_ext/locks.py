"""Locks on directories that are being written, so that two processes never write one: a kernel lock, and who has it.

The kernel's lock (`flock`) ends with the process that holds it, however that ends. Where it does not reach (another
host on a file system that keeps such locks to itself), the owner written into the lock file decides.
"""

import atexit
import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ext.errors import MegatronExtError

LOCK_FILE = ".megatron_ext.lock"
"""Name of the lock file inside a directory that is written over time."""
_BUSY = (errno.EWOULDBLOCK, errno.EACCES)
_PATIENCE = 20.0
"""Seconds that what a dead owner started has left to end."""

_held: dict[Path, "DirectoryLock"] = {}


class DirectoryLock:
    """The lock of one directory. Locks that a process has not released when it exits are released then.

    Args:
        directory: what is written, as it is called in messages.
        file: the lock file.
        purpose: what the owner does, as in "training".
    """

    def __init__(self, directory: Path, file: Path, purpose: str) -> None:
        self.directory, self.file, self.purpose = directory, file, purpose
        self._descriptor = -1
        self._owns = False
        self.depth = 0

    def acquire(self, patience: float = 0.0) -> None:
        """Take the lock for this process alone. MegatronExtError names the owner where there is one.

        Args:
            patience: seconds to wait for an owner that lives.
        """
        begun = time.monotonic()
        while (refused := self._refused()) is not None:
            owner, is_reachable = refused
            # The other ranks of a dead one, and all ranks of a dead launcher, end by themselves within seconds.
            is_ending = is_reachable and (_is_dead(owner) or _is_dead(owner.get("launcher")))
            if time.monotonic() - begun >= (max(patience, _PATIENCE) if is_ending else patience):
                self.drop()
                raise MegatronExtError(self._refusal(owner, reachable=is_reachable))
            time.sleep(0.2)
        self._owns = True
        self._write(json.dumps({"purpose": self.purpose, **_this_process(), "inode": self._inode()}) + "\n")

    def share(self) -> None:
        """Let the processes that write together hold it: one acquires, then all of them share.

        The lock is taken as long as any of them lives. MegatronExtError where somebody else got between.
        """
        if not self._try(fcntl.LOCK_SH):
            owner = self._read()
            self.drop()
            raise MegatronExtError(self._refusal(owner, reachable=True))

    def release(self) -> None:
        """Let go; the lock file goes too, unless others share it."""
        if self._descriptor < 0:
            return
        with contextlib.suppress(OSError):
            if self._owns:
                os.ftruncate(self._descriptor, 0)
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current():
                    self.file.unlink()
        self.drop()

    def drop(self) -> None:
        """Close the lock file and leave it as it is."""
        descriptor, self._descriptor, self._owns = self._descriptor, -1, False
        if descriptor >= 0:
            os.close(descriptor)

    def _refused(self) -> tuple[dict[str, Any], bool] | None:
        """Who has the lock, and whether the kernel's lock says so; None where this process may have it."""
        if not self._try(fcntl.LOCK_EX):
            return self._read(), True
        owner = self._read()
        return (owner, False) if owner and not _is_ours_to_take(owner) else None

    def _try(self, kind: int) -> bool:
        """Lock the file that now has the name; False if another process has it."""
        while True:
            if self._descriptor < 0:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _BUSY:
                    # This file system has no such locks: what is written in the file has to do.
                    owner = self._read()
                    return kind == fcntl.LOCK_SH or not _is_this_host(owner) or _is_dead(owner)
                return False
            if self._is_current():
                return True
            self.drop()  # its owner has just removed it

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.file))
        except FileNotFoundError:
            return False

    def _read(self) -> dict[str, Any]:
        """The owner written in the file; empty where there is none, or not yet, or the file is a copy."""
        try:
            owner = json.loads(os.pread(self._descriptor, 1 << 16, 0))
        except (OSError, ValueError):
            return {}
        if not isinstance(owner, dict) or owner.get("inode", self._inode()) != self._inode():
            return {}
        return owner

    def _inode(self) -> int:
        return os.fstat(self._descriptor).st_ino

    def _write(self, text: str) -> None:
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, text.encode(), 0)
            os.fsync(self._descriptor)
        except OSError as error:
            self.release()
            raise MegatronExtError(f"{self.file}: cannot be written: {error.strerror}") from error

    def _refusal(self, owner: dict[str, Any], *, reachable: bool) -> str:
        get = owner.get
        who = (
            f"by {get('purpose')} on {get('host')} (process {get('pid')}, since {get('since')}): {get('command')}"
            if owner
            else "by another process, which has not yet said its name"
        )
        if reachable:
            wait = "wait until it has ended, end it (kill PID), or choose another place"
            return f"{self.directory} is being written {who}\n  {wait}"
        return (
            f"{self.directory} was being written {who}\n  Whether that host is still at it cannot be seen from here. "
            f"If it is not, remove {self.file} and start again"
        )


@contextlib.contextmanager
def exclusive(directory: str | Path, purpose: str) -> Iterator[DirectoryLock]:
    """Be the only process that writes in `directory`, which is made where it is missing.

    Within one process the lock may be taken again.

    Args:
        purpose: what is done there, for the message that others get.

    Raises:
        MegatronExtError: another process writes there; says which, and the way out.
    """
    place = Path(directory).resolve()
    with _taken(Path(directory), place / LOCK_FILE, purpose) as lock:
        yield lock


@contextlib.contextmanager
def exclusive_output(target: str | Path, purpose: str, patience: float = 0.0) -> Iterator[DirectoryLock]:
    """Be the only process that makes the output `target`, which gets its name when it is finished.

    As `exclusive`, with the lock file beside `target` instead of in it.

    Args:
        patience: seconds to wait for another process that makes it, before it is an error.
    """
    place = Path(target).resolve()
    with _taken(Path(target), place.with_name(f".{place.name}.lock"), purpose, patience) as lock:
        yield lock


@contextlib.contextmanager
def joined(directory: str | Path, purpose: str) -> Iterator[None]:
    """Hold the lock of `directory` together with the process of the same run that took it and shares it.

    Where its lock file cannot be seen (another host's own disk) there is nothing to hold.
    """
    file = Path(directory).resolve() / LOCK_FILE
    if not file.is_file():
        yield
        return
    lock = DirectoryLock(Path(directory), file, purpose)
    lock.share()
    _held[file] = lock
    try:
        yield
    finally:
        _held.pop(file, None)
        lock.drop()


@contextlib.contextmanager
def _taken(directory: Path, file: Path, purpose: str, patience: float = 0.0) -> Iterator[DirectoryLock]:
    lock = _held.get(file)
    if lock is None:
        lock = DirectoryLock(directory, file, purpose)
        made = [folder for folder in file.parents if not folder.exists()]
        lock.acquire(patience)
        _held[file] = lock
    else:
        made = []
    lock.depth += 1
    try:
        yield lock
    finally:
        lock.depth -= 1
        if not lock.depth:
            _held.pop(file, None)  # a forked process has none
            lock.release()
            for folder in made:
                with contextlib.suppress(OSError):  # something was written there
                    folder.rmdir()


def _this_process() -> dict[str, Any]:
    return {
        **process_identity(os.getpid()),
        # torchrun's ranks end with it; a process without a launcher has nobody to end with.
        "launcher": process_identity(os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ else None,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "job": _job(),
        "command": shlex.join(sys.argv)[:1000],
    }


def process_identity(pid: int) -> dict[str, Any]:
    """A process of this host, told apart from a later one of the same number by when it started."""
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "started": start_of_process(pid)}


def _boot() -> str | None:
    """Identifies this start of this machine's kernel, whatever name a container gives it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _job() -> str | None:
    """The job whose processes never overlap: what starts under its name again, starts after the end of the last."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"{_job_kind()} {job}"
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if run == "none" else f"torchrun {run}"


def _job_kind() -> str:
    return f"slurm {os.environ.get('SLURM_CLUSTER_NAME', '')}"


def start_of_process(pid: int) -> str | None:
    """When the process `pid` of this host started, in clock ticks since boot; None if it is gone."""
    return _state_and_start(pid)[1]


def state_of_process(pid: int, started: str | None) -> str | None:
    """What the process of this host that started then is at, a letter as of `ps`: T is stopped; None if it is gone."""
    state, start = _state_and_start(pid)
    return state if start is not None and start == started else None


def _state_and_start(pid: int) -> tuple[str | None, str | None]:
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None, None
    return (None, None) if state in "ZX" else (state, fields[18])


def _is_this_host(owner: dict[str, Any]) -> bool:
    return bool(owner.get("host") == socket.gethostname() or (owner.get("boot") and owner["boot"] == _boot()))


def _is_dead(owner: dict[str, Any] | None) -> bool:
    """Whether the process `owner` is known to have ended."""
    if not owner or not _is_this_host(owner):
        return False
    if owner.get("boot") != _boot():
        return True
    pid = owner.get("pid")
    if not isinstance(pid, int) or not Path("/proc/self/stat").exists():
        return False
    return start_of_process(pid) != owner.get("started")


def _is_ours_to_take(owner: dict[str, Any]) -> bool:
    """Whether `owner`, who has no kernel lock here, is surely gone."""
    job = owner.get("job")
    return _is_this_host(owner) or (job is not None and (job == _job() or _is_over(str(job))))


def _is_over(job: str) -> bool:
    """Whether Slurm, asked about the job, knows none of that number that is still there."""
    kind, _, number = job.rpartition(" ")
    if kind != _job_kind() or not number.isdecimal():
        return False
    try:
        answer = subprocess.run(
            ["squeue", "--noheader", f"--jobs={number}", "--format=%T"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "Invalid job id" in answer.stderr or (answer.returncode == 0 and not answer.stdout.strip())


def _after_fork() -> None:
    """A forked helper (a worker that loads data) must not hold its parent's locks."""
    for lock in _held.values():
        lock.drop()
    _held.clear()


def release_all() -> None:
    """Let go of every lock; for a process that ends without Python's own exit."""
    for lock in list(_held.values()):
        lock.release()
    _held.clear()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(release_all)
