"""What the ranks of a run do together while they save and load: all succeed, or all say why not."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_ext.errors import CheckpointError

T = TypeVar("T")


def gathered(value: T) -> list[T]:
    """What every rank passed, by rank; every rank must call this."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank and return every rank's result.

    Raises:
        CheckpointError: it failed on a rank; on every rank, naming all that failed.
    """
    result, failure = None, None
    try:
        result = action()
    except (OSError, RuntimeError, CheckpointError) as error:
        failure = f"rank {dist.get_rank()}: {error}"
    outcomes: list[tuple[Any, str | None]] = gathered((result, failure))
    if failures := [why for _, why in outcomes if why]:
        raise CheckpointError("the checkpoint was not saved:\n  " + "\n  ".join(failures))
    return [value for value, _ in outcomes]


def on_first_rank(action: Callable[[], object]) -> None:
    """Run `action` on rank 0, as `together` does; every rank must call this."""
    together(lambda: action() if dist.get_rank() == 0 else None)
