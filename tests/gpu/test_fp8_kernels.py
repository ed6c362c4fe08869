"""torch's fp8 kernels on a GPU give what the same operands give on CPU."""

import pytest
import torch

from megatron_ext.config import Fp8Precision
from megatron_ext.mcore.fp8.experts import _ExpertFunction
from megatron_ext.mcore.fp8.linear import _LinearFunction
from megatron_ext.mcore.fp8.quantize import E4M3, ROW, WHOLE, Tile, quantize, tile_maxima
from megatron_ext.mcore.fp8.scaling import Scaling
from megatron_ext.runtime.accelerators import kernels_fault, precision_fault, this_machine

RECIPES = ["tensorwise", "rowwise", "delayed"]
# Sums of fp8 products in another order, or on Hopper with fewer bits where that is allowed (about 2**-13 of the sum of
# magnitudes), rounded to bf16: a unit of its 8 bits of mantissa, and near zero that of a typical value.
TOLERANCE = 2.0**-7


def precision_or_skip(recipe: str, *, has_experts: bool) -> Fp8Precision:
    precision = Fp8Precision(kind="fp8", recipe=recipe)
    missing = precision_fault("torch", precision, this_machine(), has_experts=has_experts)
    if missing:
        pytest.skip(missing)
    return precision


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_close(measured: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.float().std())
    torch.testing.assert_close(measured.cpu().float(), expected.float(), rtol=TOLERANCE, atol=TOLERANCE * scale)


@pytest.mark.parametrize("tile", [WHOLE, ROW], ids=["tensorwise", "rowwise"])
def test_gpu_and_cpu_quantise_to_the_same_bits(tile: Tile) -> None:
    x = random(256, 512, seed=0) * 2.0 ** torch.randint(-20, 20, (256, 512)).to(torch.bfloat16)
    on_cpu = quantize(x, E4M3, tile, tile_maxima(x, tile))
    on_gpu = quantize(x.cuda(), E4M3, tile, tile_maxima(x.cuda(), tile))
    assert torch.equal(on_gpu.scale.cpu(), on_cpu.scale)
    assert torch.equal(on_gpu.values.cpu().view(torch.uint8), on_cpu.values.view(torch.uint8))


@pytest.mark.parametrize("recipe", RECIPES)
def test_linear_layer_and_its_gradients_equal_those_on_cpu(recipe: str) -> None:
    precision = precision_or_skip(recipe, has_experts=False)
    x, w, g = random(256, 512, seed=0), random(384, 512, seed=1), random(256, 384, seed=2) * 1e-3
    results = []
    for device in ("cpu", "cuda"):
        inputs = [t.to(device).requires_grad_() for t in (x, w)]
        y = _LinearFunction.apply(*inputs, Scaling(precision).to(device), None, False, False)
        results.append((y.detach(), *torch.autograd.grad(y, inputs, g.to(device))))
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert_close(on_gpu, on_cpu)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("counts", [[64, 7, 100, 85], [0, 200, 1, 55]], ids=["busy", "idle"])
def test_experts_and_their_gradients_equal_those_on_cpu(recipe: str, counts: list[int]) -> None:
    precision = precision_or_skip(recipe, has_experts=True)
    x, w, g = random(256, 512, seed=0), random(4, 384, 512, seed=1), random(256, 384, seed=2) * 1e-3
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    results = []
    for device in ("cpu", "cuda"):
        inputs = [t.to(device).requires_grad_() for t in (x, w)]
        scaling = Scaling(precision, gradient_format=E4M3).to(device)
        y = _ExpertFunction.apply(*inputs, ends.to(device), scaling)
        results.append((y.detach(), *torch.autograd.grad(y, inputs, g.to(device))))
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert_close(on_gpu, on_cpu)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_kept_weights_change_no_bit(recipe: str, kernels: str) -> None:
    """Of two micro-batches in a step, by a linear layer and by experts, one of which is idle."""
    dense, experts = (precision_or_skip(recipe, has_experts=kind) for kind in (False, True))
    if kernels == "triton" and (missing := kernels_fault(this_machine())):
        pytest.skip(missing)
    x, g = (random(256, width, seed=width).cuda() for width in (512, 384))
    one, stacked = (random(*shape, 384, 512, seed=9).cuda() for shape in ((), (4,)))
    ends = torch.tensor([64, 64, 200, 256]).cumsum(0).clamp(max=256).to(torch.int32).cuda()
    results = []
    for keeps in (False, True):
        options = {"triton": kernels == "triton"}
        of_one = Scaling(dense, **options).cuda()
        of_stacked = Scaling(experts, gradient_format=E4M3, **options).cuda()
        if keeps:
            of_one.open_step()
            of_stacked.open_step()
        found = []
        for scale in (1.0, 3.0):
            inputs = [t.clone().requires_grad_() for t in (scale * x, one, stacked)]
            y = _LinearFunction.apply(*inputs[:2], of_one, None, False, False)
            z = _ExpertFunction.apply(inputs[0], inputs[2], ends, of_stacked)
            found += [y.detach(), z.detach(), *torch.autograd.grad(y + z, inputs, g)]
        results.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_not_finite_stays_visible(recipe: str) -> None:
    precision = precision_or_skip(recipe, has_experts=False)
    x, w = random(64, 128, seed=0).cuda(), random(32, 128, seed=1).cuda()
    x[3, 5] = torch.inf
    y = _LinearFunction.apply(x, w, Scaling(precision).cuda(), None, False, False)
    assert y[3].isnan().all()
