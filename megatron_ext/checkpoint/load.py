"""Fills a run's tensors from a checkpoint, whatever layout it was saved in."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

import torch

from megatron_ext.checkpoint.integrity import require_whole_together
from megatron_ext.checkpoint.shape_faults import shape_faults, shown
from megatron_ext.checkpoint.shards import Shape, TensorShard
from megatron_ext.checkpoint.torch_dist import TorchDistReader
from megatron_ext.errors import CheckpointError

log = logging.getLogger(__name__)


class ShardReader(Protocol):
    """Stored tensors of which shards can be read."""

    @property
    def tensors(self) -> Collection[str]:
        """The keys."""

    def shape(self, key: str) -> Shape:
        """Global shape of a tensor."""

    def read_into(self, key: str, offset: Shape, target: torch.Tensor) -> None:
        """Fill `target` with the shard of `key` at `offset`, converting the dtype where it differs."""


def holds_optimizer(checkpoint: Path) -> bool:
    """Whether `checkpoint` holds more than weights; what was converted or imported has no more."""
    reader = TorchDistReader(checkpoint)
    try:
        return _has_optimizer(reader.tensors)
    finally:
        reader.close()


def _has_optimizer(keys: Collection[str]) -> bool:
    return any(key.startswith("optimizer.") for key in keys)


def _way_out(reader: ShardReader, expected: Collection[str]) -> str:
    if _has_optimizer(reader.tensors) or not _has_optimizer(expected):
        return ""
    return (
        "\nIt holds no optimizer: start a new run from its weights, with another checkpoint.directory and "
        "checkpoint.initialize_from; or go on here without, checkpoint.load_optimizer = false"
    )


def load_shards(checkpoint: Path, shards: Sequence[TensorShard]) -> None:
    """Fill the memory of `shards` from `checkpoint`. In a run every rank must call this.

    Raises:
        CheckpointError: naming every tensor that is missing or has another shape.
    """
    require_whole_together(checkpoint)
    reader = TorchDistReader(checkpoint)
    fill_shards(reader, checkpoint, shards)
    reader.close()


def fill_shards(reader: ShardReader, checkpoint: Path, shards: Sequence[TensorShard]) -> None:
    """`load_shards` from whatever reads the tensors of `checkpoint`."""
    afresh = {
        shard.key
        for shard in shards
        if shard.optional and (shard.key not in reader.tensors or reader.shape(shard.key) != shard.global_shape)
    }
    if afresh:
        log.info("%s lacks %d tensors that start afresh, such as %s", checkpoint, len(afresh), min(afresh))
    shards = [shard for shard in shards if shard.key not in afresh]
    expected = {shard.key: shard.global_shape for shard in shards}
    present = {key: reader.shape(key) for key in expected if key in reader.tensors}
    if faults := shape_faults(present, expected, "this run needs"):
        raise CheckpointError(f"{checkpoint} does not fit this run:\n{shown(faults)}{_way_out(reader, expected)}")
    with torch.no_grad():
        for shard in sorted(shards, key=lambda shard: (shard.key, shard.offset)):
            reader.read_into(shard.key, shard.offset, shard.data)
