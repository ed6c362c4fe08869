"""The cast to FP8: a tensor times its inverse scales, rounded once, as it stands and transposed from one reading.

    q[r, k] = fp8(x[r, k] / scale[r]),  and of the transpose  p[k, r] = fp8(x[r, k] / scale'[k])

Scales are powers of two (mcore/fp8/quantize.py), so the product is exact and the bits are those of the torch steps.
Bytes an element in bf16: 3 for one layout (2 read, 1 written), 4 for both; the torch steps move 7 and 16, and turn
bytes around in memory besides. `x` may be a transposed view: it is read as it lies.

torchao's casts are for one layout each, of its own scales, and in its prototype namespace; Transformer Engine's
cast-transpose needs Transformer Engine.
"""

#   B matrices, R rows, K columns

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 64


@triton.jit
def _scaled(tile, inverse, LARGEST: tl.constexpr, SATURATES: tl.constexpr):
    scaled = tile * inverse
    if SATURATES:  # comparisons leave NaN as it is
        scaled = tl.where(scaled > LARGEST, LARGEST, tl.where(scaled < -LARGEST, -LARGEST, scaled))
    return scaled


@triton.jit
def _cast(
    x,
    inverse,
    values,
    inverse_t,
    values_t,
    rows,
    columns,
    x_matrix,
    x_row,
    x_column,
    inverse_matrix,
    inverse_row,
    inverse_t_matrix,
    inverse_t_column,
    LARGEST: tl.constexpr,
    SATURATES: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    matrix = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (r < rows)[:, None] & (k < columns)[None, :]
    place = matrix * x_matrix + r[:, None] * x_row + k[None, :] * x_column
    tile = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    by_row = tl.load(inverse + matrix * inverse_matrix + r * inverse_row, mask=r < rows, other=0.0)
    scaled = _scaled(tile, by_row[:, None], LARGEST, SATURATES)
    target = values + matrix * rows * columns + r[:, None] * columns + k[None, :]
    tl.store(target, scaled.to(values.dtype.element_ty), mask=inside)
    if BOTH:
        place_t = matrix * inverse_t_matrix + k * inverse_t_column
        by_column = tl.load(inverse_t + place_t, mask=k < columns, other=0.0)
        scaled = _scaled(tile, by_column[None, :], LARGEST, SATURATES)
        target = values_t + matrix * rows * columns + k[None, :] * rows + r[:, None]
        tl.store(target, scaled.to(values.dtype.element_ty), mask=inside)


def cast(x_BRK: Tensor, scale: Tensor, dtype: torch.dtype, *, saturates: bool) -> Tensor:
    """Return `x / scale` in `dtype`, contiguous.

    Args:
        x_BRK: with or without the first dimension, of any strides.
        scale: powers of two in fp32 of as many dimensions, the last one 1; the others 1 or of the size of `x`.
        saturates: whether what is too large becomes the largest number of `dtype`; otherwise nothing may be too large.
    """
    values, _ = _run(x_BRK, scale, None, dtype, saturates)
    return values


def cast_both(
    x_BRK: Tensor, scale: Tensor, scale_t: Tensor, dtype: torch.dtype, *, saturates: bool
) -> tuple[Tensor, Tensor]:
    """Return `x / scale` [B, R, K] and `x.mT / scale_t` [B, K, R], as two calls of `cast` would, from one reading."""
    values, values_t = _run(x_BRK, scale, scale_t, dtype, saturates)
    assert values_t is not None
    return values, values_t


def _run(
    x: Tensor, scale: Tensor, scale_t: Tensor | None, dtype: torch.dtype, saturates: bool
) -> tuple[Tensor, Tensor | None]:
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    values_t = None if scale_t is None else torch.empty(x.mT.shape, dtype=dtype, device=x.device)
    if not x.numel():
        return values, values_t
    x_BRK = x if x.dim() == 3 else x.unsqueeze(0)
    matrices, rows, columns = x_BRK.shape
    inverse = scale.reciprocal().expand(*x_BRK.shape[:-1], 1)
    inverse_t = None if scale_t is None else scale_t.reciprocal().expand(matrices, columns, 1)
    _cast[(triton.cdiv(rows, _BLOCK), triton.cdiv(columns, _BLOCK), matrices)](
        x_BRK,
        inverse,
        values,
        inverse_t,
        values_t,
        rows,
        columns,
        *x_BRK.stride(),
        *inverse.stride()[:2],
        *((0, 0) if inverse_t is None else inverse_t.stride()[:2]),
        LARGEST=torch.finfo(dtype).max,
        SATURATES=saturates,
        BOTH=scale_t is not None,
        BLOCK=_BLOCK,
    )
    return values, values_t
