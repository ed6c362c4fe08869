"""One save of a checkpoint by all ranks, in two halves: `stage`, after which tensors may change, and `finish`.

What is not finished never looks complete: everything is written beside the final name, which it gets last.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.checkpoint.collective import gathered, on_first_rank, together
from megatron_ext.checkpoint.find import checkpoint_name
from megatron_ext.checkpoint.publish import publish, remove_leftovers, remove_old, write_small_files
from megatron_ext.checkpoint.shards import TensorShard
from megatron_ext.checkpoint.state_file import write_random_states
from megatron_ext.checkpoint.torch_dist import ChunkRecord, TorchDistWriter, write_metadata
from megatron_ext.errors import CheckpointError
from megatron_ext.files import UNFINISHED
from megatron_ext.manifest import FileSum, write_manifest


@dataclass(frozen=True)
class SmallFiles:
    """What a checkpoint holds besides tensors, as it was when the save began."""

    iteration: int
    scalars: Mapping[str, Any]
    """The content of `state.json`."""
    run: dict[str, Any]
    """The resolved configuration, as plain mappings."""
    random_state: dict[str, Any] | None = None
    """Of this rank."""
    tokenizer: Path | None = None
    """Directory whose tokenizer the checkpoint carries."""


@dataclass(frozen=True)
class StagedSave:
    """A save whose tensors are taken: what is left to do reads nothing that training changes."""

    final: Path
    partial: Path
    content: SmallFiles
    random_states: list[dict[str, Any] | None]
    """Of every rank."""
    chunks: list[ChunkRecord]
    sums: dict[str, FileSum]


def stage(directory: Path, shards: Sequence[TensorShard], content: SmallFiles) -> StagedSave:
    """Take what is to be saved; every rank must call this.

    Raises:
        CheckpointError: a rank could not write, or a number is not finite; on every rank, and nothing is left of it.
    """
    final = directory / checkpoint_name(content.iteration)
    partial = final.with_name(final.name + UNFINISHED)

    def prepare() -> None:
        remove_leftovers(directory)
        partial.mkdir(parents=True)

    with _leaving_nothing(partial):
        together(lambda: _require_finite(shards))
        on_first_rank(prepare)
        written = together(lambda: _write_shards(partial, shards))
        random_states = gathered(content.random_state)
    chunks = [record for records, _ in written for record in records]
    sums = {name: file_sum for _, of_rank in written for name, file_sum in of_rank.items()}
    return StagedSave(final, partial, content, random_states, chunks, sums)


def finish(staged: StagedSave, keep_last: int | None = None) -> Path:
    """Complete a staged save and return the checkpoint; every rank must call this.

    Args:
        keep_last: remove all but this many checkpoints; the newest two are always kept.

    Raises:
        CheckpointError: as `stage`.
    """
    partial, content = staged.partial, staged.content

    def complete() -> None:
        write_metadata(partial, staged.chunks)
        write_small_files(partial, content.iteration, content.scalars, content.run, content.tokenizer)
        write_random_states(partial, staged.random_states)
        write_manifest(partial, staged.sums)
        publish(partial, staged.final, content.iteration)

    with _leaving_nothing(partial):
        on_first_rank(complete)
        on_first_rank(lambda: remove_old(staged.final.parent, keep_last))
    return staged.final


@contextmanager
def _leaving_nothing(partial: Path) -> Iterator[None]:
    """Remove what is unfinished where the save fails."""
    try:
        yield
    except CheckpointError:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        raise


def _write_shards(partial: Path, shards: Sequence[TensorShard]) -> tuple[list[ChunkRecord], dict[str, FileSum]]:
    """Write this rank's file; return its chunks and its sum."""
    writer = TorchDistWriter(partial, f"__{dist.get_rank()}_0.distcp")
    try:
        for shard in shards:
            if shard.is_writer:
                writer.write(shard.key, shard.global_shape, shard.offset, shard.data)
        return writer.finish(), {writer.name: writer.sum}
    except BaseException:
        writer.abandon()
        raise


def _require_finite(shards: Sequence[TensorShard]) -> None:
    """Raise CheckpointError where a number of this rank is not: a run that diverged must not replace a good state."""
    bad = {
        shard.key
        for shard in shards
        if shard.is_writer and shard.data.is_floating_point() and not bool(torch.isfinite(shard.data).all())
    }
    if bad:
        raise CheckpointError(
            f"{len(bad)} tensors hold NaN or infinity, such as {min(bad)}: the run has diverged. Start it again to go "
            "on from the newest checkpoint, with a lower optimizer.lr or past the bad batches (train.skip_steps)"
        )
