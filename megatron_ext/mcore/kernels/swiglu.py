"""SwiGLU times the routing weight: one kernel forward, one backward.

    y = w g s u,  s = 1 / (1 + exp(-g))
    dg = dy w u s (1 + g (1 - s)),  du = dy w g s,  dw = sum of dy g s u over the row

g and u are the halves of a row, w its routing weight (1 in dense layers). Computed in fp32 and rounded once; the torch
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
def _forward(projected, weights, output, width, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(projected + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(projected + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        result *= tl.load(weights + row).to(tl.float32)
    tl.store(output + row * width + column, result, mask=inside)


@triton.jit
def _backward(
    projected, weights, grad, grad_projected, grad_weights, width, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
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
        sigmoid = tl.sigmoid(gate)
        activated = gate * sigmoid
        if WEIGHTED:
            total += upstream * activated * up
            upstream *= tl.load(weights + row).to(tl.float32)
        grad_gate = upstream * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(grad_projected + row * 2 * width + column, grad_gate, mask=inside)
        tl.store(grad_projected + row * 2 * width + width + column, upstream * activated, mask=inside)
    if WEIGHTED:
        tl.store(grad_weights + row, tl.sum(total, axis=0))


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(projected, weights)
        width = projected.shape[-1] // 2
        output = projected.new_empty(*projected.shape[:-1], width)
        rows = output.numel() // width
        if rows:
            grid = (rows, triton.cdiv(width, _BLOCK))
            _forward[grid](projected, weights, output, width, WEIGHTED=weights is not None, BLOCK=_BLOCK)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        projected, weights = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_projected = torch.empty_like(projected)
        grad_weights = None if weights is None else torch.empty_like(weights)
        width = grad.shape[-1]
        if grad.numel():
            _backward[(grad.numel() // width,)](
                projected,
                weights,
                grad,
                grad_projected,
                grad_weights,
                width,
                WEIGHTED=weights is not None,
                BLOCK=_BLOCK,
            )
        return grad_projected, grad_weights


def swiglu(projected: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return `silu(gate) * up`, times `weights`, [..., F] in the dtype of `projected`.

    Args:
        projected: [..., 2 F], gate before up.
        weights: [...], one factor a row, of any floating dtype.
    """
    output: Tensor = _SwiGlu.apply(projected.contiguous(), None if weights is None else weights.contiguous())
    return output
