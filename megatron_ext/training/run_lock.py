"""The lock of a run's checkpoint directory: taken by rank 0, held by every rank, so that it lasts while any lives."""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from megatron_ext.checkpoint.collective import gathered
from megatron_ext.errors import CheckpointError, MegatronExtError
from megatron_ext.locks import LOCK_FILE, exclusive, joined

_SEEN_WITHIN = 60.0
"""Seconds in which a file that another host has written is seen on every file system that is shared."""
_LOOK = 0.1


@contextlib.contextmanager
def run_lock(directory: str | Path) -> Iterator[None]:
    """Be the only run that writes into `directory`. Every rank must call this.

    Raises:
        CheckpointError: another run writes there, it cannot be written, or it is not one directory for all ranks; on
            every rank.
    """
    with contextlib.ExitStack() as held:
        said: list[str | None] = [None, None]
        if dist.get_rank() == 0:
            try:
                lock = held.enter_context(exclusive(directory, "training"))
                lock.share()
                said[1] = lock.file.read_text()
            except MegatronExtError as error:
                said[0] = str(error)
            except OSError as error:
                said[0] = f"checkpoint.directory = {str(directory)!r}: {error.strerror}"
        dist.broadcast_object_list(said, src=0)
        if said[0] is not None:
            raise CheckpointError(said[0]).everywhere()
        _require_one(directory, str(said[1]))
        if dist.get_rank() != 0:
            held.enter_context(joined(directory, "training"))
        yield
        if dist.get_rank() != 0:
            held.close()
        # After a failure nobody waits here: the lock ends with the processes.
        dist.barrier()


def _require_one(directory: str | Path, owner: str) -> None:
    """Raise CheckpointError, on every rank, where a rank does not see what rank 0 has written into the lock file."""
    host = socket.gethostname()
    told = gathered((host, _sees(Path(directory).resolve() / LOCK_FILE, owner)))
    if blind := [rank for rank, (_, sees) in enumerate(told) if not sees]:
        hosts = list(dict.fromkeys(told[rank][0] for rank in blind))
        shown = ", ".join(hosts[:8]) + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")
        raise CheckpointError(
            f"checkpoint.directory = {str(directory)!r} is not the same directory for all ranks: what rank 0 on "
            f"{told[0][0]} writes there is not seen on {shown} (ranks {blind[0]} to {blind[-1]}). Each writes what "
            "it alone holds, and reads what others wrote: put it on a file system that every node sees. Training waits "
            "for a copy in memory, not for that file system. Only a run on one node may have it on a local disk, with "
            "a shared checkpoint.copy_to"
        ).everywhere()


def _sees(file: Path, owner: str) -> bool:
    """Whether `file` has `owner` in it, at once or within the time in which another host's file may come to be seen."""
    deadline = time.monotonic() + _SEEN_WITHIN
    while True:
        with contextlib.suppress(OSError, ValueError):
            if file.read_text() == owner:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK)
