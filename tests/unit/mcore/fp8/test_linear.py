"""fp8 products against float64: outputs and both gradients within what the formats' rounding predicts."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import ScalingType

from megatron_ext.config import Fp8Precision
from megatron_ext.mcore.fp8.experts import _ExpertFunction, padded_columns
from megatron_ext.mcore.fp8.linear import _LinearFunction
from megatron_ext.mcore.fp8.products import product
from megatron_ext.mcore.fp8.quantize import E4M3, E5M2, ROW, WHOLE, quantize, tile_maxima
from megatron_ext.mcore.fp8.scaling import Role, Scaling

RECIPES = ["tensorwise", "rowwise", "delayed", "blockwise", "mxfp8"]
M, K, N = 96, 160, 144

# An operand in e4m3 (e5m2) has a relative error of at most half a unit in the last place, 2**-4 (2**-3). A dot product
# of two such operands is therefore off by at most ((1 + a)(1 + b) - 1) * sum |x| |w|.
HALF_ULP = {E4M3: 2.0**-4, E5M2: 2.0**-3}
# On average far less: the error of an operand is evenly spread over a unit in the last place, so its root mean square
# is that unit / sqrt(12), relative to a mantissa of m in [1, 2) with mean square of 1 / m of about 1/2 (log-uniform:
# 3 / (8 ln 2)). Errors of different terms are independent, so the norm of the product's error relative to the norm of
# the product is sqrt(a^2 + b^2) of two operands' values; e4m3 twice gives 0.0375, e5m2 with e4m3 0.059.
RMS = {dtype: 2 * bound / math.sqrt(12) * math.sqrt(3 / (8 * math.log(2))) for dtype, bound in HALF_ULP.items()}


def precision(recipe: str, **fields: object) -> Fp8Precision:
    return Fp8Precision(kind="fp8", recipe=recipe, **fields)


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, w, g = (torch.randn(shape, generator=generator).to(dtype) for shape in ((M, K), (N, K), (M, N)))
    return x.requires_grad_(), w.requires_grad_(), 1e-4 * g


def linear(x: torch.Tensor, w: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    return _LinearFunction.apply(x, w, scaling, None, False, False)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("form", ["hybrid", "e4m3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_and_both_gradients_are_as_near_to_float64_as_the_formats_are(
    recipe: str, form: str, dtype: torch.dtype
) -> None:
    x, w, g = operands(dtype)
    y = linear(x, w, Scaling(precision(recipe, format=form)))
    grads = torch.autograd.grad(y, (x, w), g)
    x64, w64, g64 = (t.detach().double() for t in (x, w, g))
    gradient = E5M2 if form == "hybrid" else E4M3
    # Rounding the result to bf16 adds half a unit of its 8 bits of mantissa.
    last = 2.0**-9 if dtype is torch.bfloat16 else 2.0**-24
    for name, measured, (a, b), formats in (
        ("y", y, (x64, w64.t()), (E4M3, E4M3)),
        ("dx", grads[0], (g64, w64), (gradient, E4M3)),
        ("dw", grads[1], (g64.t(), x64), (gradient, E4M3)),
    ):
        assert measured.dtype == dtype
        exact = a @ b
        error = (measured.detach().double() - exact).abs()
        bound = math.prod(1 + HALF_ULP[f] for f in formats) * (1 + last) - 1
        worst = float((error / (a.abs() @ b.abs())).max())
        relative = float(error.norm() / exact.norm())
        predicted = math.hypot(*(RMS[f] for f in formats), last)
        print(
            f"{recipe} {form} {name}: worst {worst:.4f} of {bound:.4f}, norm {relative:.4f}, predicted {predicted:.4f}"
        )
        assert worst < bound
        # From both sides: an error much below the prediction would mean that nothing was quantised.
        assert 0.85 * predicted < relative < 1.15 * predicted


@pytest.mark.parametrize("recipe", RECIPES)
def test_weight_gradients_can_stay_in_bf16(recipe: str) -> None:
    x, w, g = operands(torch.bfloat16)
    y = linear(x, w, Scaling(precision(recipe, fp8_wgrad=False)))
    (dw,) = torch.autograd.grad(y, w, g)
    assert torch.equal(dw, g.t() @ x)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_reaches_the_loss_and_the_gradients(recipe: str, value: float) -> None:
    x, w, g = operands(torch.bfloat16)
    broken = x.detach().clone()
    broken[5, 7] = value
    y = linear(broken, w, Scaling(precision(recipe)))
    assert y[5].isnan().all()
    (dw,) = torch.autograd.grad(y, w, g)
    assert dw[:, 7].isnan().all()
    broken_gradient = g.clone()
    broken_gradient[5, 7] = value
    for gradient in torch.autograd.grad(linear(x, w, Scaling(precision(recipe))), (x, w), broken_gradient):
        assert gradient.isnan().any()


def test_layers_without_blocks_to_share_agree_over_recipes() -> None:
    """Scales are powers of two: on ordinary data every recipe rounds alike."""
    x, w, _ = operands(torch.float32)
    outputs = [linear(x, w, Scaling(precision(recipe))) for recipe in RECIPES]
    assert all(torch.allclose(y, outputs[0], rtol=1e-4, atol=1e-4) for y in outputs)


def test_an_outlier_costs_small_numbers_their_precision_unless_scales_are_fine() -> None:
    """Why there are finer recipes: a number 2**24 times the others sends them to zero if they share its scale."""
    x, w, _ = operands(torch.float32)
    x = x.detach()
    x[0, 0] = 2.0**24
    errors = {}
    for recipe in RECIPES:
        y = linear(x, w, Scaling(precision(recipe))).detach()
        exact = x.double() @ w.detach().double().t()
        errors[recipe] = float((y - exact)[1:].norm() / exact[1:].norm())
    assert errors["tensorwise"] == errors["delayed"] == 1.0
    assert max(errors["rowwise"], errors["blockwise"], errors["mxfp8"]) < 0.05


@pytest.mark.parametrize("left", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("tile", [WHOLE, ROW], ids=["tensorwise", "rowwise"])
def test_torch_kernel_equals_the_dequantised_product(left: torch.dtype, tile: tuple[int | None, int | None]) -> None:
    """torch has these two kernels for CPU: the numbers that CUDA will be given are those that CPU runs train with."""
    x, w, _ = (t.detach() for t in operands(torch.bfloat16))
    a, b = quantize(x, left, tile, tile_maxima(x, tile)), quantize(w, E4M3, tile, tile_maxima(w, tile))
    recipe = ScalingType.TensorWise if tile == WHOLE else ScalingType.RowWise
    scales = (a.scale.view(()), b.scale.view(())) if tile == WHOLE else (a.scale, b.scale.t())
    kernel = F.scaled_mm(a.values, b.values.t(), scales[0], recipe, scales[1], recipe, output_dtype=torch.bfloat16)
    ours = product(a, b, torch.bfloat16, fast=False)
    # Sums in another order may fall on the other side of a bf16 rounding boundary: one unit of 8 bits.
    assert torch.allclose(kernel.float(), ours.float(), rtol=2.0**-7, atol=1e-4)
    assert (kernel == ours).float().mean() > 0.99


# --- routed experts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("fp8_wgrad", [True, False])
@pytest.mark.parametrize("counts", [[32, 40, 8, 16], [0, 33, 0, 1]], ids=["busy", "idle"])
def test_experts_equal_one_linear_layer_an_expert(recipe: str, fp8_wgrad: bool, counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(sum(counts), K, generator=generator).bfloat16().requires_grad_()
    w = torch.randn(len(counts), N, K, generator=generator).bfloat16().requires_grad_()
    g = torch.randn(sum(counts), N, generator=generator).bfloat16()
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    recipe_ = precision(recipe, fp8_wgrad=fp8_wgrad)
    y = _ExpertFunction.apply(x, w, ends, Scaling(recipe_, gradient_format=E4M3))
    dx, dw = torch.autograd.grad(y, (x, w), g)
    one_by_one = replace(recipe_, format="e4m3")
    rows = zip(x.split(counts), g.split(counts), y.split(counts), dx.split(counts), strict=True)
    for e, (x_e, g_e, y_e, dx_e) in enumerate(rows):
        if not len(x_e):
            assert not dw[e].any()
            continue
        x_e, w_e = x_e.detach().requires_grad_(), w[e].detach().requires_grad_()
        expected = linear(x_e, w_e, Scaling(one_by_one))
        expected_dx, expected_dw = torch.autograd.grad(expected, (x_e, w_e), g_e)
        for measured, reference in ((y_e, expected), (dx_e, expected_dx), (dw[e], expected_dw)):
            assert torch.equal(measured, reference)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("counts", [[32, 40, 7, 17], [0, 33, 0, 1], [0, 0, 0, 5]])
def test_tokens_prepared_for_the_cuda_kernel_are_those_of_each_expert(recipe: str, counts: list[int]) -> None:
    """The kernel contracts multiples of 16 tokens; what is laid out for it is each expert's own, then zeros."""
    x = torch.randn(sum(counts), 24, generator=torch.Generator().manual_seed(7)).bfloat16()
    scaling = Scaling(precision(recipe))
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    values, scales, padded_ends = padded_columns(scaling, Role.INPUT, x, ends)
    assert values.is_contiguous()
    assert padded_ends.dtype == torch.int32
    assert values.shape[1] >= padded_ends[-1]
    assert values.shape[1] % 16 == 0
    starts = [0, *padded_ends.tolist()[:-1]]
    for e, (start, end, own) in enumerate(zip(starts, padded_ends.tolist(), x.split(counts), strict=True)):
        assert start % 16 == end % 16 == 0
        part = values[:, start:end].float() * scales[e].unsqueeze(1)
        assert not part[:, len(own) :].any()
        whole = scaling.maxima(Role.INPUT, x) if recipe == "tensorwise" else None
        if len(own):
            assert torch.equal(part[:, : len(own)], scaling.quantize(Role.INPUT, own.t(), whole).dequantize())
