"""A range of a flattened tensor as shards."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.checkpoint.shards import shards_of_range


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), st.data())
def test_boxes_tile_the_range_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    numbers = torch.arange(size).view(shape)
    shards = list(shards_of_range(shape, start, stop))
    visited = [
        numbers[tuple(slice(o, o + s) for o, s in zip(offset, extent, strict=True))].flatten()
        for offset, extent in shards
    ]
    joined = torch.cat(visited) if visited else torch.empty(0, dtype=torch.long)
    assert joined.tolist() == list(range(start, stop))
    assert len(shards) <= 2 * len(shape) - 1
