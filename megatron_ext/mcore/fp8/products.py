"""Products of fp8 operands: torch's scaled kernels on CUDA, the same numbers by dequantising on CPU."""

#   M x K times N x K gives M x N; T tokens sorted by expert, E experts

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from megatron_ext.mcore.fp8.quantize import WHOLE, Quantized


def product(a_MK: Quantized, b_NK: Quantized, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """Return `a @ b.T`, [M, N] in `dtype`: fp8 numbers multiplied and added in fp32, scaled, rounded once.

    Args:
        fast: let Hopper's tensor cores add with fewer bits, as is usual for activations but not for gradients.
    """
    if not a_MK.values.is_cuda:
        return (a_MK.dequantize() @ b_NK.dequantize().t()).to(dtype)
    if a_MK.tile == WHOLE:
        recipe, scale_a, scale_b = ScalingType.TensorWise, a_MK.scale.view(()), b_NK.scale.view(())
    else:
        recipe, scale_a, scale_b = ScalingType.RowWise, a_MK.scale, b_NK.scale.t()
    return F.scaled_mm(
        a_MK.values, b_NK.values.t(), scale_a, recipe, scale_b, recipe, output_dtype=dtype, use_fast_accum=fast
    )


def grouped_product(a_TK: Quantized, b_ENK: Quantized, ends_E: Tensor, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """Multiply each expert's rows of `a` by the transpose of its own matrix of `b`: [T, N] in `dtype`.

    Expert e has the rows from `ends_E[e - 1]` (int32) up to `ends_E[e]`. torch's grouped kernel takes e4m3 operands
    with a scale for each row only, so the scale of a whole tensor is repeated for it.
    """
    if not a_TK.values.is_cuda:
        parts = a_TK.dequantize().tensor_split(ends_E[:-1].tolist())
        return torch.cat([a @ b.t() for a, b in zip(parts, b_ENK.dequantize(), strict=True)]).to(dtype)
    tokens, (experts, width, _) = a_TK.values.shape[0], b_ENK.values.shape
    return F.scaled_grouped_mm(  # type: ignore[attr-defined]
        a_TK.values,
        b_ENK.values.transpose(1, 2),
        scale_of_rows(a_TK.scale, tokens),
        ScalingType.RowWise,
        scale_of_rows(b_ENK.scale, experts, width),
        ScalingType.RowWise,
        offs=ends_E,
        output_dtype=dtype,
        use_fast_accum=fast,
    )


def scale_of_rows(scale: Tensor, *rows: int) -> Tensor:
    """Return the scale of each row, of shape `rows`; contiguous, as the kernel asks, also where all have one."""
    return scale.expand(*rows, 1).reshape(rows).contiguous()
