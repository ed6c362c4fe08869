"""The sum of each token's rows: what experts returned (combine), or the gradients of a token's copies (dispatch).

    y[t] = sum over k of x[places[t, k]]

Added up in fp32 by place and rounded once: without atomic operations, so the same bits each time. With K rows a token,
bytes for each of the H columns of y: 2 K read, 2 written; gathering the rows first and then summing them moves
2 K more each way, `index_add_` as many and K roundings in any order. The backward pass is a gather, torch's own.

liger-kernel has none; torchao's permute_and_pad sorts rows by expert but leaves their sum to an index_add; Transformer
Engine's fused unpermute needs Transformer Engine.
"""

#   T tokens, K places a token, R rows, H hidden

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _sum(rows, places, sums, row_count, width, PLACES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for nth in range(PLACES):
        place = tl.load(places + token * PLACES + nth)
        there = (column < width) & (place < row_count)
        total += tl.load(rows + place * width + column, mask=there, other=0.0).to(tl.float32)
    tl.store(sums + token * width + column, total, mask=column < width)


def gather_sum(rows_RH: Tensor, places_TK: Tensor) -> Tensor:
    """Return [T, H], the sum of the rows at each token's places; places from R on have no row, and count nothing.

    Args:
        places_TK: int64, none negative.
    """
    (row_count, width), (tokens, places) = rows_RH.shape, places_TK.shape
    sums_TH = torch.empty(tokens, width, dtype=rows_RH.dtype, device=rows_RH.device)
    if sums_TH.numel():
        grid = (tokens, triton.cdiv(width, _BLOCK))
        _sum[grid](rows_RH.contiguous(), places_TK.contiguous(), sums_TH, row_count, width, PLACES=places, BLOCK=_BLOCK)
    return sums_TH
