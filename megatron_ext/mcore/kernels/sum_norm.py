"""A residual sum and the norm of it (RMSNorm or LayerNorm), one kernel each way.

    s = x + residual,  n = (s - m) r,  y = n w + b,  r = (mean((s - m)^2) + eps)^-1/2,  m = mean(s), for RMSNorm 0
    ds = r (g w - c - n mean(g w n)) + gs,  dw = sum of g n,  db = sum of g,  c = mean(g w), for RMSNorm 0

g is the gradient of y, gs that of s as the residual stream goes on; dx and the residual's gradient are both ds. s is
rounded before its norm is taken, as the torch steps do; statistics are fp32. dw and db are sums over blocks of rows,
then over the blocks, in one order. Bytes for each of the H columns of a row: 8 forward (4 read, 4 written), 8 backward
(6 read, 2 written); torch's sum and fused norm, and autograd's sum of both gradients, move 26.

Formulas: arXiv 1910.07467 and 1607.06450. liger-kernel has the same for RMSNorm alone (as FusedAddRMSNorm) and adds
gradients of the weight up by as many partial sums as there are multiprocessors, so that another card gives other bits;
quack's compiles by CUTLASS's DSL (97 MB); torchao has none.
"""

#   H normalised width, R rows

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCKS = 512
"""Of rows, each with a partial sum of the weight's gradient."""


@triton.jit
def _forward(
    x, residual, weight, bias, total, y, means, scales, width, epsilon, CENTRED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    s = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    s += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    rounded = s.to(total.dtype.element_ty)
    tl.store(total + place, rounded, mask=inside)
    s = rounded.to(tl.float32)
    if CENTRED:
        mean = tl.sum(s, axis=0) / width
        s = tl.where(inside, s - mean, 0.0)
        tl.store(means + row, mean)
    scale = tl.rsqrt(tl.sum(s * s, axis=0) / width + epsilon)
    tl.store(scales + row, scale)
    result = s * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        result += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, result, mask=inside)


@triton.jit
def _backward(
    grad,
    grad_total,
    total,
    weight,
    means,
    scales,
    grad_input,
    grad_weights,
    grad_biases,
    rows,
    width,
    rows_of_block,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program a block of rows, so that the sum over it is made in one order.
    block = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    sum_weight = tl.zeros((BLOCK,), tl.float32)
    sum_bias = tl.zeros((BLOCK,), tl.float32)
    for row in range(block * rows_of_block, tl.minimum((block + 1) * rows_of_block, rows)):
        place = row * width + column
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        n = tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + row)
        if CENTRED:
            n = tl.where(inside, n - tl.load(means + row), 0.0)
            sum_bias += g
        n *= scale
        sum_weight += g * n
        g *= w
        away = n * (tl.sum(g * n, axis=0) / width)
        if CENTRED:
            away += tl.sum(g, axis=0) / width
        ds = scale * (g - away) + tl.load(grad_total + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_input + place, ds, mask=inside)
    tl.store(grad_weights + block * width + column, sum_weight, mask=inside)
    if CENTRED:
        tl.store(grad_biases + block * width + column, sum_bias, mask=inside)


def _warps(block: int) -> int:
    """So that a thread holds at most 16 numbers of each tensor."""
    return max(4, min(16, block // 512))


class _SumNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight_H: Tensor, bias_H: Tensor | None, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        total, y = torch.empty_like(x), torch.empty_like(x)
        width = x.shape[-1]
        rows = x.numel() // width
        scales_R = torch.empty(rows, dtype=torch.float32, device=x.device)
        means_R = None if bias_H is None else torch.empty_like(scales_R)
        if rows:
            block = triton.next_power_of_2(width)
            options = {"CENTRED": bias_H is not None, "BLOCK": block, "num_warps": _warps(block)}
            _forward[(rows,)](x, residual, weight_H, bias_H, total, y, means_R, scales_R, width, epsilon, **options)
        ctx.save_for_backward(total, weight_H, means_R, scales_R)
        return total, y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total, weight_H, means_R, scales_R = ctx.saved_tensors
        grad_total, grad = (one.contiguous() for one in grads)
        grad_input, width, rows = torch.empty_like(total), total.shape[-1], len(scales_R)
        of_block = max(triton.cdiv(rows, _BLOCKS), 1)
        blocks = triton.cdiv(rows, of_block)
        weights_BH = torch.empty(blocks, width, dtype=torch.float32, device=total.device)
        biases_BH = None if means_R is None else torch.empty_like(weights_BH)
        if rows:
            block = triton.next_power_of_2(width)
            options = {"CENTRED": biases_BH is not None, "BLOCK": block, "num_warps": _warps(block)}
            tensors = grad, grad_total, total, weight_H, means_R, scales_R, grad_input, weights_BH, biases_BH
            _backward[(blocks,)](*tensors, rows, width, of_block, **options)
        grad_bias = None if biases_BH is None else biases_BH.sum(dim=0).to(weight_H.dtype)
        return grad_input, grad_input, weights_BH.sum(dim=0).to(weight_H.dtype), grad_bias, None


def sum_norm(
    x: Tensor, residual: Tensor, weight_H: Tensor, bias_H: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return `x + residual` and its norm, [..., H] in the dtype of `x`.

    Args:
        residual: of the shape and dtype of `x`.
        bias_H: that of a LayerNorm; None for RMSNorm.
    """
    total, normalized = _SumNorm.apply(x.contiguous(), residual.contiguous(), weight_H, bias_H, epsilon)
    return total, normalized
