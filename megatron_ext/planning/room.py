"""How large a run's checkpoints are on the disk, and how many it still adds to those that stand there."""

from collections.abc import Sequence
from pathlib import Path

from megatron_ext.checkpoint.retention import Retention
from megatron_ext.checkpoint.tokenizer_files import tokenizer_files
from megatron_ext.config import CheckpointConfig, RunConfig, smallest_world_size
from megatron_ext.planning.memory import checkpoint_bytes, saved_tensors

_AROUND = 1_825
"""Bytes in torch's files around each piece of a tensor: an archive of its own (1,600), and a note of its place."""
_RANDOM_STATE = 31_000
"""Bytes of a rank's."""
_STATES = 4
"""Of each tensor: the weight, in fp32 the optimizer's own, and two moments."""


def bytes_on_disk(run: RunConfig) -> int:
    """Bytes of a checkpoint's files: its tensors, what is around them, random states and the tokenizer.

    Of the fewest ranks that the layout takes. More of them add 31 kB each, and a few pieces of tensors where their
    shares of the optimizer begin and end.
    """
    pieces = 0
    for name, tensor in saved_tensors(run).items():
        split = run.parallel.etp if tensor.is_expert else run.parallel.tensor_model_parallel_size
        halves = 2 if run.model.gated_linear_unit and ".linear_fc1." in name else 1  # gate and up stand apart
        pieces += _STATES * halves * (split if tensor.tp_dimension is not None else 1)
    directory = Path(run.data.tokenizer)
    tokenizer = sum((directory / name).stat().st_size for name in tokenizer_files(directory))
    random_states = _RANDOM_STATE * smallest_world_size(run.parallel)
    return checkpoint_bytes(run) + _AROUND * pieces + random_states + tokenizer


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
