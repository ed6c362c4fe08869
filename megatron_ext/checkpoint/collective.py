"""What the ranks of a run do together while they save and load: all succeed, or all say why not."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_ext.errors import CheckpointError

T = TypeVar("T")

NOT_SAVED = "the checkpoint was not saved"

_SHOWN = 8
_WAIT = 5.0
"""Seconds of one wait for the first rank, well within the timeout of a collective."""


def gathered(value: T) -> list[T]:
    """What every rank passed, by rank; every rank must call this. For what is small: it reaches every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(action: Callable[[], object], what: str = NOT_SAVED) -> None:
    """Run `action` on every rank.

    Args:
        what: what it means where it fails.

    Raises:
        CheckpointError: it failed on a rank; on every rank, naming all that failed. Of the class that says most of it.
    """
    failure: tuple[str, type[CheckpointError]] | None = None
    try:
        action()
    except (OSError, RuntimeError, CheckpointError) as error:
        kind = type(error) if isinstance(error, CheckpointError) else CheckpointError
        failure = f"rank {dist.get_rank()}: {error}", kind
    if failures := [one for one in gathered(failure) if one is not None]:
        kinds = [kind for _, kind in failures]
        raised = next((kind for kind in kinds if kind is not CheckpointError), CheckpointError)
        raise raised(said_by_ranks(what, [why for why, _ in failures])).everywhere()


def said_by_ranks(what: str, failures: Sequence[str]) -> str:
    """The message for what went wrong on some ranks."""
    more = [f"and {len(failures) - _SHOWN} more ranks"] if len(failures) > _SHOWN else []
    return f"{what}:\n  " + "\n  ".join([*failures[:_SHOWN], *more])


def on_first_rank(action: Callable[[], object]) -> None:
    """Run `action` on rank 0, as `together` does; every rank must call this."""
    together(lambda: action() if dist.get_rank() == 0 else None)


def on_first_rank_slowly(action: Callable[[], object], what: str) -> None:
    """As `on_first_rank`, for what may take longer than a collective waits."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - raised below
            failures.append(error)

    def raise_failure() -> None:
        if failures:
            raise failures[0]

    thread = threading.Thread(target=work, daemon=True)
    if dist.get_rank() == 0:
        thread.start()
        thread.join(_WAIT)
    while gathered(thread.is_alive())[0]:
        if dist.get_rank() == 0:
            thread.join(_WAIT)
    together(raise_failure, what)
