"""Shards of global tensors: what a process holds of a tensor that is spread over many."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from megatron_ext.canonical.catalogue import Shape

__all__ = ["Shape", "TensorShard", "shards_of_range"]


@dataclass(frozen=True)
class TensorShard:
    """`data` stands at `offset` of the global tensor `key`. It is live memory: saving reads it, loading fills it."""

    key: str
    global_shape: Shape
    offset: Shape
    data: Tensor
    is_writer: bool
    """Whether this process writes it; other processes hold copies."""
    optional: bool = False
    """Whether a checkpoint may lack it, or have it in another shape; then `data` stays as it is."""


def shards_of_range(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """Split the elements [start, stop) of a row-major tensor of `shape` into axis-aligned shards (offset, size).

    Shards come in row-major order and each is contiguous, so consecutive slices of the flat data fill them. At most
    2 * len(shape) - 1 are needed.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        yield from _in_row(first, shape, head, tail)
        return
    if head:
        yield from _in_row(first, shape, head, row)
        first += 1
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    if tail:
        yield from _in_row(last, shape, 0, tail)


def _in_row(row: int, shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    for offset, size in shards_of_range(shape[1:], start, stop):
        yield (row, *offset), (1, *size)
