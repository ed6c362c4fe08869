"""Rotary embedding of queries or keys: each pair of dimensions turned by its token's angle, one kernel each way.

    y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin,  and the dimensions that do not turn as they are

x1 and x2 are the halves of the rotated dimensions, or neighbours; latent attention's come as neighbours and leave as
halves, after the dimensions that do not turn. The backward pass is the turn by the opposite angle, the way back.
Computed in fp32 with cosine and sine in fp32, and rounded once; the torch steps (megatron-core's, as published:
arXiv 2104.09864, section 3.4.2) round cosine, sine, both products and the sum. Bytes an element: 4 each way (2 read, 2
written); the torch steps move 44, and 8 where latent attention's dimensions do not turn, which are split off and joined
again. `x` is read as it lies, which after a split of the projection is not contiguous.

liger-kernel's kernel rotates in place, halves alone and all dimensions, with the batch before the sequence: two copies
here; quack's is the same but for partial rotation, and compiles by CUTLASS's DSL (97 MB).
"""

#   S sequence, B micro-batch, N heads, D head width, R rotated width

from dataclasses import dataclass
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
    FROM_NEIGHBOURS: tl.constexpr,
    TO_NEIGHBOURS: tl.constexpr,
    LAST: tl.constexpr,
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
    start = rest if LAST else 0
    source_first = start + tl.where(FROM_NEIGHBOURS, 2 * pair, pair)[None, :]
    target_first = start + tl.where(TO_NEIGHBOURS, 2 * pair, pair)[None, :]
    source_apart = 1 if FROM_NEIGHBOURS else half
    target_apart = 1 if TO_NEIGHBOURS else half
    inside = (head < heads)[:, None] & turned[None, :]
    source = x + token * x_token + sample * x_sample + head[:, None] * x_head
    target = y + (row * heads + head[:, None]) * (2 * half + rest)
    x1 = tl.load(source + source_first, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + source_first + source_apart, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + target_first, x1 * cosine - x2 * sine, mask=inside)
    tl.store(target + target_first + target_apart, x2 * cosine + x1 * sine, mask=inside)
    if PASSES:
        dimension = tl.arange(0, REST)[None, :]
        still = dimension + (0 if LAST else 2 * half)
        kept = (head < heads)[:, None] & (dimension < rest)
        tl.store(target + still, tl.load(source + still, mask=kept, other=0.0), mask=kept)


@dataclass(frozen=True)
class Pairs:
    """Where the two dimensions of a pair lie in a head."""

    from_neighbours: bool
    """In what is turned: dimensions 2 i and 2 i + 1 of the rotated ones; otherwise i and i + R / 2."""
    to_neighbours: bool
    """The same in the result."""
    last: bool = False
    """The rotated dimensions are the last of a head; otherwise the first."""

    @property
    def back(self) -> "Pairs":
        """Of the way back."""
        return Pairs(self.to_neighbours, self.from_neighbours, self.last)


HALVES, NEIGHBOURS = Pairs(False, False), Pairs(True, True)
LATENT = Pairs(True, False, last=True)
"""Latent attention's: DeepSeek's layout of the weights, sorted as megatron-core sorts it."""


def _turned(x_SBND: Tensor, cosines_SR: Tensor, sines_SR: Tensor, direction: float, pairs: Pairs) -> Tensor:
    """`x` with each pair turned by its angle times `direction`, contiguous."""
    tokens, batch, heads, width = x_SBND.shape
    half = cosines_SR.shape[-1]
    rest = width - 2 * half
    if x_SBND.stride(-1) != 1:
        x_SBND = x_SBND.contiguous()
    y_SBND = torch.empty(x_SBND.shape, dtype=x_SBND.dtype, device=x_SBND.device)
    if y_SBND.numel():
        width = triton.next_power_of_2(half)
        block = min(triton.next_power_of_2(heads), max(_TILE // width, 1))
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
            FROM_NEIGHBOURS=pairs.from_neighbours,
            TO_NEIGHBOURS=pairs.to_neighbours,
            LAST=pairs.last,
            PASSES=rest > 0,
            HEADS=block,
            HALF=width,
            REST=triton.next_power_of_2(max(rest, 1)),
        )
    return y_SBND


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SBND: Tensor, cosines_SR: Tensor, sines_SR: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(cosines_SR, sines_SR)
        ctx.pairs = pairs
        return _turned(x_SBND, cosines_SR, sines_SR, 1.0, pairs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cosines_SR, sines_SR = ctx.saved_tensors
        return _turned(grads[0], cosines_SR, sines_SR, -1.0, ctx.pairs.back), None, None, None


def rotate(x_SBND: Tensor, cosines_SR: Tensor, sines_SR: Tensor, pairs: Pairs) -> Tensor:
    """Return `x` with the first (or last) dimensions of each head turned, contiguous, in the dtype of `x`.

    Args:
        x_SBND: of any strides.
        cosines_SR: [S, R / 2] in fp32, contiguous; a factor on queries and keys is in them and in the sines.
        pairs: HALVES, NEIGHBOURS or LATENT.
    """
    rotated: Tensor = _Rotation.apply(x_SBND, cosines_SR, sines_SR, pairs)
    return rotated
