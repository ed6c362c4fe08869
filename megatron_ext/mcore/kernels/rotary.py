"""Rotary embedding of queries or keys: each pair of dimensions turned by its token's angle, one kernel each way.

    y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin,  and the dimensions that do not turn as they are

x1 and x2 are the halves of the rotated dimensions, or neighbours. The backward pass is the turn by the opposite angle.
Computed in fp32 with cosine and sine in fp32, and rounded once; the torch steps (megatron-core's, as published:
arXiv 2104.09864, section 3.4.2) round cosine, sine, both products and the sum. Bytes an element: 4 each way (2 read, 2
written); the torch steps move 44. `x` is read as it lies, which after a split of the projection is not contiguous.

liger-kernel's kernel rotates in place, halves alone and all dimensions, with the batch before the sequence: two copies
here; quack's is the same but for partial rotation, and compiles by CUTLASS's DSL (97 MB).
"""

#   S sequence, B micro-batch, N heads, D head width, R rotated width

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024
"""Pairs that one program turns: 8 a thread, 16 bytes of bf16."""


@triton.jit
def _rotate(
    x,
    cosines,
    sines,
    y,
    batch,
    heads,
    half,
    rest,
    x_token,
    x_sample,
    x_head,
    direction,
    NEIGHBOURS: tl.constexpr,
    PASSES: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token, sample = row // batch, row % batch
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    turned = pair < half
    cosine = tl.load(cosines + token * half + pair, mask=turned, other=0.0)[None, :]
    sine = tl.load(sines + token * half + pair, mask=turned, other=0.0)[None, :] * direction
    first = tl.where(NEIGHBOURS, 2 * pair, pair)[None, :]
    apart = 1 if NEIGHBOURS else half
    inside = (head < heads)[:, None] & turned[None, :]
    source = x + token * x_token + sample * x_sample + head[:, None] * x_head
    target = y + (row * heads + head[:, None]) * (2 * half + rest)
    x1 = tl.load(source + first, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + first + apart, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + first, x1 * cosine - x2 * sine, mask=inside)
    tl.store(target + first + apart, x2 * cosine + x1 * sine, mask=inside)
    if PASSES:
        still = 2 * half + tl.arange(0, REST)[None, :]
        kept = (head < heads)[:, None] & (still < 2 * half + rest)
        tl.store(target + still, tl.load(source + still, mask=kept, other=0.0), mask=kept)


def _turned(x_SBND: Tensor, cosines_SR: Tensor, sines_SR: Tensor, direction: float, neighbours: bool) -> Tensor:
    """`x` with each pair turned by its angle times `direction`, contiguous."""
    tokens, batch, heads, width = x_SBND.shape
    half = cosines_SR.shape[-1]
    rest = width - 2 * half
    if x_SBND.stride(-1) != 1:
        x_SBND = x_SBND.contiguous()
    y_SBND = torch.empty(x_SBND.shape, dtype=x_SBND.dtype, device=x_SBND.device)
    if y_SBND.numel():
        pairs = triton.next_power_of_2(half)
        block = min(triton.next_power_of_2(heads), max(_TILE // pairs, 1))
        _rotate[(tokens * batch, triton.cdiv(heads, block))](
            x_SBND,
            cosines_SR,
            sines_SR,
            y_SBND,
            batch,
            heads,
            half,
            rest,
            *x_SBND.stride()[:3],
            direction,
            NEIGHBOURS=neighbours,
            PASSES=rest > 0,
            HEADS=block,
            HALF=pairs,
            REST=triton.next_power_of_2(max(rest, 1)),
        )
    return y_SBND


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SBND: Tensor, cosines_SR: Tensor, sines_SR: Tensor, neighbours: bool) -> Tensor:
        ctx.save_for_backward(cosines_SR, sines_SR)
        ctx.neighbours = neighbours
        return _turned(x_SBND, cosines_SR, sines_SR, 1.0, neighbours)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cosines_SR, sines_SR = ctx.saved_tensors
        return _turned(grads[0], cosines_SR, sines_SR, -1.0, ctx.neighbours), None, None, None


def rotate(x_SBND: Tensor, cosines_SR: Tensor, sines_SR: Tensor, *, neighbours: bool) -> Tensor:
    """Return `x` with the first dimensions of each head turned, contiguous, in the dtype of `x`.

    Args:
        x_SBND: of any strides.
        cosines_SR: [S, R / 2] in fp32, contiguous; a factor on queries and keys is in them and in the sines.
        neighbours: pairs are dimensions 2 i and 2 i + 1; otherwise i and i + R / 2.
    """
    rotated: Tensor = _Rotation.apply(x_SBND, cosines_SR, sines_SR, neighbours)
    return rotated
