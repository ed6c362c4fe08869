"""Which part of a sequence a context-parallel rank holds: one early and one late chunk, Megatron's zigzag.

A sequence is cut into 2 * CP equal chunks, and rank r holds chunks r and 2 * CP - 1 - r. A causal query costs as much
as it has predecessors, so every rank has the same work.
"""

import torch
from torch import Tensor


def zigzag_chunks(rank: int, size: int) -> tuple[int, ...]:
    """Numbers of the chunks that `rank` of `size` holds, in the order in which it holds them."""
    return (rank, 2 * size - 1 - rank) if size > 1 else (0,)


def zigzag_slice(whole: Tensor, rank: int, size: int, dim: int) -> Tensor:
    """The part of `whole` along `dim` that `rank` of `size` holds; `dim` must be a multiple of 2 * `size` long."""
    if size == 1:
        return whole
    chunks = whole.chunk(2 * size, dim)
    return torch.cat([chunks[number] for number in zigzag_chunks(rank, size)], dim)


def zigzag_restore(gathered: Tensor, size: int) -> Tensor:
    """The sequence along dimension 0 in its own order, from what all ranks hold one after the other."""
    if size == 1:
        return gathered
    order = [number for rank in range(size) for number in zigzag_chunks(rank, size)]
    chunks = gathered.chunk(2 * size)
    return torch.cat([chunks[order.index(number)] for number in range(2 * size)])
