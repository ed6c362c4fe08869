"""Adam's moments kept in bf16, and updated a block at a time, against the formula in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.config import AdamConfig
from megatron_ext.mcore import optimizer
from megatron_ext.mcore.optimizer import FusedAdam

STEPS = 12
SHAPES = ((7, 5), (64,), (3, 11, 2))


def settings(**options: Any) -> AdamConfig:
    return AdamConfig(kind="adam", lr=1e-2, weight_decay=0.1, **options)


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) * 10.0**-which for which, shape in enumerate(SHAPES)]


def trained(adam: AdamConfig) -> FusedAdam:
    weights = [gradient.clone() for gradient in gradients(1000)]
    fused = FusedAdam([{"params": weights, "lr": adam.lr, "weight_decay": adam.weight_decay}], adam)
    for step in range(STEPS):
        for weight, gradient in zip(weights, gradients(step), strict=True):
            weight.grad = gradient
        fused.step()
    return fused


def by_formula(adam: AdamConfig, dtypes: tuple[torch.dtype, torch.dtype]) -> list[Tensor]:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) in float64, with moments rounded after each step."""
    weights = [gradient.double() for gradient in gradients(1000)]
    moments = [[torch.zeros_like(w), torch.zeros_like(w)] for w in weights]
    b1, b2 = adam.adam_beta1, adam.adam_beta2
    for step in range(1, STEPS + 1):
        for which, gradient in enumerate(g.double() for g in gradients(step - 1)):
            first = b1 * moments[which][0] + (1 - b1) * gradient
            second = b2 * moments[which][1] + (1 - b2) * gradient.square()
            moved = first / (1 - b1**step) / ((second / (1 - b2**step)).sqrt() + adam.adam_eps)
            weights[which] = weights[which] * (1 - adam.lr * adam.weight_decay) - adam.lr * moved
            kept = (moment.to(dtype).double() for moment, dtype in zip((first, second), dtypes, strict=True))
            moments[which] = list(kept)
    return weights


@pytest.mark.parametrize("kept_in", [("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "bf16")], ids=str)
@pytest.mark.parametrize("block", [2**26, 16], ids=["at once", "in blocks"])
def test_moments_are_computed_in_fp32_and_kept_as_asked(
    kept_in: tuple[Any, Any], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "_BLOCK", block)
    adam = settings(exp_avg_dtype=kept_in[0], exp_avg_sq_dtype=kept_in[1])
    fused = trained(adam)
    dtypes = tuple({"fp32": torch.float32, "bf16": torch.bfloat16}[name] for name in kept_in)
    exact = by_formula(adam, dtypes)  # type: ignore[arg-type]
    found = fused.param_groups[0]["params"]
    moved = max(float((w - g).abs().max()) for w, g in zip(found, gradients(1000), strict=True))
    worst = max(float((a - b).abs().max()) for a, b in zip(found, exact, strict=True))
    print(f"{kept_in}: moved by {moved:.2g}, of which {worst / moved:.1e} is wrong")
    # A moment that falls beside the boundary between two numbers of bf16 may round to the other one: 2^-8 of one step.
    assert worst / moved < (1e-5 if kept_in == ("fp32", "fp32") else 1e-3)
    for states in fused.state.values():
        assert (states["exp_avg"].dtype, states["exp_avg_sq"].dtype) == dtypes


def test_blocks_have_every_number_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "_BLOCK", 16)
    numbers = torch.arange(7 * 5 + 64 + 66).split([7 * 5, 64, 66])
    blocks = list(optimizer._blocks([(one, -one) for one in numbers]))
    assert [sum(len(one) for one, _ in block) for block in blocks] == [16] * 10 + [5]
    assert torch.equal(torch.cat([one for block in blocks for one, _ in block]), torch.arange(165))
    assert all(torch.equal(one, -other) for block in blocks for one, other in block)
