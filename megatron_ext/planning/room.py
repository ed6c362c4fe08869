"""How many checkpoints a run still adds to those that stand in its directory."""

from collections.abc import Sequence

from megatron_ext.checkpoint.retention import Retention
from megatron_ext.config import CheckpointConfig


def retention_of(settings: CheckpointConfig) -> Retention:
    """Which checkpoints of a run stay."""
    return Retention(
        keep_last=settings.keep_last,
        keep_every=settings.keep_every,
        keep_matching=settings.keep_matching,
        keep_initial=settings.save_initial,
    )


def saved_steps(settings: CheckpointConfig, done: int, last: int) -> Sequence[int]:
    """The steps after `done` up to `last` that are saved."""
    if last <= done:
        return ()
    if settings.save_interval is None:
        return (last,)
    interval = settings.save_interval
    planned = range((done // interval + 1) * interval, last + 1, interval)
    return planned if last % interval == 0 else (*planned, last)


def checkpoints_to_come(settings: CheckpointConfig, done: int, last: int, there: Sequence[int]) -> int:
    """The most that will stand there beside those of the steps `there`, at any time until step `last`."""
    saves = saved_steps(settings, done, last)
    if not saves:
        return 0
    retention = retention_of(settings)
    if retention.newest is None:
        return len(saves)
    # An old one goes once a newer one is complete, so that one more than the newest stand there for a moment; those
    # that stay stand beside them, and take up room now or never give it back.
    stay = sum(map(retention.keeps, saves))
    go = sum(not retention.keeps(step) for step in there)
    return max(min(retention.newest + 1 - go + stay, len(saves)), 1)
