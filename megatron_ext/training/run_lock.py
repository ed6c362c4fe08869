"""The lock of a run's checkpoint directory: taken by rank 0, held by every rank, so that it lasts while any lives."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from megatron_ext.errors import CheckpointError, MegatronExtError
from megatron_ext.locks import exclusive, joined


@contextlib.contextmanager
def run_lock(directory: str | Path) -> Iterator[None]:
    """Be the only run that writes into `directory`. Every rank must call this.

    Raises:
        CheckpointError: another run writes there, or it cannot be written; on every rank.
    """
    with contextlib.ExitStack() as held:
        said: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                held.enter_context(exclusive(directory, "training")).share()
            except MegatronExtError as error:
                said = [str(error)]
            except OSError as error:
                said = [f"checkpoint.directory = {str(directory)!r}: {error.strerror}"]
        dist.broadcast_object_list(said, src=0)
        if said[0] is not None:
            raise CheckpointError(said[0]).everywhere()
        if dist.get_rank() != 0:
            held.enter_context(joined(directory, "training"))
        yield
        if dist.get_rank() != 0:
            held.close()
        # After a failure nobody waits here: the lock ends with the processes.
        dist.barrier()
