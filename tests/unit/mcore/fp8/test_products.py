"""What torch's grouped fp8 kernel is given: on CUDA it takes a scale for each row, in contiguous memory."""

import pytest
import torch

from megatron_ext.config import Fp8Precision
from megatron_ext.mcore.fp8.experts import padded_columns
from megatron_ext.mcore.fp8.products import scale_of_rows
from megatron_ext.mcore.fp8.quantize import E4M3
from megatron_ext.mcore.fp8.scaling import Role, Scaling


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "delayed"])
def test_every_row_has_a_scale_in_memory_of_its_own(recipe: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scaling = Scaling(Fp8Precision(kind="fp8", recipe=recipe), gradient_format=E4M3)  # type: ignore[arg-type]
    tokens = scaling.quantize(Role.INPUT, torch.randn(48, 32, generator=generator))
    weights = scaling.quantize(Role.WEIGHT, torch.randn(3, 16, 32, generator=generator))
    for quantized, rows in ((tokens, (48,)), (weights, (3, 16))):
        scales = scale_of_rows(quantized.scale, *rows)
        assert (scales.shape, scales.dtype) == (rows, torch.float32)
        assert scales.is_contiguous()
        restored = quantized.values.float() * scales.unsqueeze(-1)
        assert torch.equal(restored, quantized.dequantize())


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "delayed"])
def test_every_column_of_an_experts_share_has_one_too(recipe: str) -> None:
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    scaling = Scaling(Fp8Precision(kind="fp8", recipe=recipe), gradient_format=E4M3)  # type: ignore[arg-type]
    ends = torch.tensor([7, 7, 40], dtype=torch.int32)
    values, scales, padded_ends = padded_columns(scaling, Role.GRADIENT, x, ends)
    assert scales.shape == (3, 32)
    assert scales.is_contiguous()
    for expert, (begin, end) in enumerate([(0, 7), (7, 7), (7, 40)]):
        first = int(padded_ends[expert - 1]) if expert else 0
        restored = values[:, first : first + end - begin].float() * scales[expert].unsqueeze(1)
        # e4m3 keeps 4 bits: half a unit of the last is 2^-4 of a value, or near zero of the smallest normal one.
        torch.testing.assert_close(restored.t(), x[begin:end], rtol=2.0**-4, atol=1e-2)
