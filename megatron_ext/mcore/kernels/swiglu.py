"""SwiGLU and its kin times the routing weight: one kernel forward, one backward.

    y = w g s (u + o),  s = 1 / (1 + exp(-a g))
    dg = dy w (u + o) s (1 + a g (1 - s)),  du = dy w g s,  dw = sum of dy g s (u + o) over the row

g and u are the halves of a row, w its routing weight (1 in dense layers); the slope a is 1 and the offset o is 0 in
SwiGLU, 1.702 and 1 in gpt-oss. With a limit, g is cut off above it and u on both sides, and so are their gradients:
they are 0 beyond it. Computed in fp32 and rounded once; the torch
steps of mcore/activation.py round after each factor. Bytes for each of the F columns of y: 6 forward (4 read, 2
written), 10 backward (6 read, 4 written); the torch steps move 62 with weights and 36 without.

Formula: arXiv 2002.05202. liger-kernel's SwiGLU has no weights, and wants g and u as tensors of their own, which here
would be two more copies; torchao has none.
"""

#   F width of the feed-forward network

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _forward(
    projected,
    weights,
    output,
    width,
    limit,
    SLOPE: tl.constexpr,
    OFFSET: tl.constexpr,
    LIMITED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(projected + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(projected + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    if LIMITED:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    result = gate * tl.sigmoid(SLOPE * gate) * (up + OFFSET)
    if WEIGHTED:
        result *= tl.load(weights + row).to(tl.float32)
    tl.store(output + row * width + column, result, mask=inside)


@triton.jit
def _backward(
    projected,
    weights,
    grad,
    grad_projected,
    grad_weights,
    width,
    limit,
    SLOPE: tl.constexpr,
    OFFSET: tl.constexpr,
    LIMITED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program a row, so that the sum over it is made in one order.
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(projected + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(projected + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if LIMITED:
            gate_beyond, up_beyond = gate > limit, tl.abs(up) > limit
            gate = tl.where(gate_beyond, limit, gate)
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        sigmoid = tl.sigmoid(SLOPE * gate)
        activated, linear = gate * sigmoid, up + OFFSET
        if WEIGHTED:
            total += upstream * activated * linear
            upstream *= tl.load(weights + row).to(tl.float32)
        grad_gate = upstream * linear * sigmoid * (1.0 + SLOPE * gate * (1.0 - sigmoid))
        grad_up = upstream * activated
        if LIMITED:
            grad_gate = tl.where(gate_beyond, 0.0, grad_gate)
            grad_up = tl.where(up_beyond, 0.0, grad_up)
        tl.store(grad_projected + row * 2 * width + column, grad_gate, mask=inside)
        tl.store(grad_projected + row * 2 * width + width + column, grad_up, mask=inside)
    if WEIGHTED:
        tl.store(grad_weights + row, tl.sum(total, axis=0))


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, weights: Tensor | None, limit: float, shape: dict[str, Any]) -> Tensor:
        ctx.save_for_backward(projected, weights)
        ctx.limit, ctx.shape = limit, shape
        width = projected.shape[-1] // 2
        output = projected.new_empty(*projected.shape[:-1], width)
        rows = output.numel() // width
        if rows:
            grid = (rows, triton.cdiv(width, _BLOCK))
            _forward[grid](projected, weights, output, width, limit, **shape)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        projected, weights = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_projected = torch.empty_like(projected)
        grad_weights = None if weights is None else torch.empty_like(weights)
        width = grad.shape[-1]
        if grad.numel():
            _backward[(grad.numel() // width,)](
                projected, weights, grad, grad_projected, grad_weights, width, ctx.limit, **ctx.shape
            )
        return grad_projected, grad_weights, None, None


def swiglu(
    projected: Tensor,
    weights: Tensor | None = None,
    *,
    slope: float = 1.0,
    limit: float | None = None,
    offset: float = 0.0,
) -> Tensor:
    """Return `gate sigmoid(slope gate) (up + offset)`, times `weights`, [..., F] in the dtype of `projected`.

    Args:
        projected: [..., 2 F], gate before up.
        weights: [...], one factor a row, of any floating dtype.
        limit: the gate is cut off above this, up on both sides.
    """
    weights = None if weights is None else weights.contiguous()
    shape = {
        "SLOPE": slope,
        "OFFSET": offset,
        "LIMITED": limit is not None,
        "WEIGHTED": weights is not None,
        "BLOCK": _BLOCK,
    }
    output: Tensor = _SwiGlu.apply(projected.contiguous(), weights, 0.0 if limit is None else limit, shape)
    return output
