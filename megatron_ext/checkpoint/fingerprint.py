"""Whether weights are those that others were trained beside: one number, the same from any layout and any file.

Every element's bits, times a number drawn from its tensor's name and its place in it, mixed and summed modulo 2**64.
Shards of a tensor add up to the whole. It tells models apart; whoever wants to forge one can.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_ext.canonical.catalogue import EMBEDDING, OUTPUT
from megatron_ext.canonical.seeds import seed_from_name
from megatron_ext.checkpoint.shards import Shape, TensorShard

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_MULTIPLIER = -7046029254386353131  # 2**64 / golden ratio, odd, as int64
_AT_ONCE = 2**22
"""Elements that are looked at at once, as wide numbers."""


def shard_sum(key: str, offset: Shape, data: Tensor) -> Tensor:
    """The part of the sum that `data` makes at `offset` of the tensor `key`: an int64 scalar on its device."""
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    if data.numel() == 0:
        return total
    *before, last = offset
    columns = _weights(key, data.dim(), last, data.shape[-1], data.device)
    rows = data.reshape(-1, data.shape[-1])
    weights = torch.ones(1, dtype=torch.int64, device=data.device)
    for dim, start in enumerate(before):
        own = _weights(key, dim, start, data.shape[dim], data.device)
        weights = (weights[:, None] * own).flatten()
    step = max(_AT_ONCE // data.shape[-1], 1)
    for some, of_rows in zip(rows.split(step), weights.split(step), strict=True):
        bits = some.contiguous().view(_BITS[data.dtype]).to(torch.int64)
        mixed = bits * columns * of_rows[:, None]
        total += (mixed ^ (mixed >> 32)).sum()
    return total


def _weights(key: str, dim: int, start: int, size: int, device: torch.device) -> Tensor:
    """An odd number for each index of a dimension, which no other tensor and dimension has."""
    places = torch.arange(start, start + size, dtype=torch.int64, device=device)
    mixed = (places + seed_from_name(dim, key)) * _MULTIPLIER
    mixed = (mixed ^ (mixed >> 29)) * _MULTIPLIER
    return mixed ^ (mixed >> 32) | 1


def fingerprint_sum(shards: Iterable[TensorShard], vocab_size: int) -> int:
    """The sum over those of `shards` that this process writes; to be added up over all processes, modulo 2**64.

    Args:
        vocab_size: rows of embedding and output layer that are tokens; the padding below them differs between layouts.
    """
    total = 0
    for shard in shards:
        if not shard.is_writer:
            continue
        data = shard.data
        if shard.key in (EMBEDDING, OUTPUT):
            data = data[: max(vocab_size - shard.offset[0], 0)]
        total += int(shard_sum(shard.key, shard.offset, data))
    return total


def fingerprint(total: int, dtype: torch.dtype) -> str:
    """What is recorded of the sum over all shards of weights that are held in `dtype`."""
    return f"{str(dtype).removeprefix('torch.')}:{total % 2**64:016x}"
