"""Noisy gating: the random numbers, their formulas, and that every layout draws the same ones."""

import math
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.config import (
    GatingNormalization,
    GumbelNoise,
    InputJitter,
    LearnedNoise,
    ParallelConfig,
)
from megatron_ext.mcore.moe import noise, sample_seeds
from megatron_ext.mcore.moe.selection import normalize_gating_logits
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from tests.unit.mcore.moe.gates import (
    ALONE,
    EXPERTS,
    HIDDEN,
    LAYOUTS,
    LENGTH,
    PRECISIONS,
    SAMPLES,
    build_router,
    hidden_states,
    my_part,
)


@pytest.fixture(scope="module")
def draws() -> tuple[Tensor, Tensor]:
    keys = noise._mix(torch.arange(20_000))
    return keys, noise.uniform(keys, 8)


def test_uniform_numbers_are_uniform_and_independent(draws: tuple[Tensor, Tensor]) -> None:
    _, numbers = draws
    flat = numbers.double().flatten()
    assert 0 < float(flat.min()) < 1e-4
    assert 1 - 1e-4 < float(flat.max()) < 1
    n = flat.numel()
    # Four standard errors of mean and variance of the uniform distribution, and of correlations.
    assert abs(float(flat.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / n)
    assert abs(float(flat.var()) - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    correlation = torch.corrcoef(torch.cat((numbers, numbers.roll(1, dims=0)), dim=1).t()) - torch.eye(16)
    assert float(correlation.abs().max()) < 5 / math.sqrt(len(numbers))
    spread = torch.histc(flat.float(), bins=64, min=0, max=1)
    assert float(((spread - n / 64) ** 2 / (n / 64)).sum()) < 63 + 5 * math.sqrt(2 * 63)


def test_splitmix_has_its_published_numbers() -> None:
    """The first three numbers of SplitMix64 seeded with 1234567 (the reference implementation's test vector)."""
    states = torch.tensor([1234567]) + noise._GOLDEN * torch.arange(3)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [x % 2**64 for x in noise._mix(states).tolist()] == expected


def test_gumbel_and_normal_numbers_have_their_moments(draws: tuple[Tensor, Tensor]) -> None:
    keys, _ = draws
    gumbel, normal = noise.gumbel(keys, 8).double(), noise.normal(keys, 8).double()
    n = normal.numel()
    assert abs(float(gumbel.mean()) - 0.5772156649) < 4 * math.pi / math.sqrt(6 * n)
    assert float(gumbel.var()) == pytest.approx(math.pi**2 / 6, rel=0.03)
    assert abs(float(normal.mean())) < 4 / math.sqrt(n)
    assert float(normal.var()) == pytest.approx(1, rel=0.02)
    assert float((normal**4).mean()) == pytest.approx(3, rel=0.05)


NOISES = [
    GumbelNoise(kind="gumbel", scale=0.7),
    LearnedNoise(kind="learned"),
    InputJitter(kind="input_jitter", eps=0.3),
]


def noisy_weights(kind: Any, parallel: ParallelConfig, layer: int = 2, training: bool = True) -> Tensor:
    """Routing weights of all tokens [S, samples, E]."""
    router = build_router(tiny_model(moe=True, moe_router_noise=kind), parallel).train(training)
    router.set_layer_number(layer)
    dp = parallel_state.get_data_parallel_group()
    sample_seeds.hand_down(torch.arange(100, 100 + SAMPLES).chunk(dp.size())[dp.rank()])
    mine = my_part(hidden_states(), router)
    weights, _ = router(mine)
    everyone = torch.full((LENGTH, SAMPLES, EXPERTS), math.nan)
    rows = router.grid.positions(len(mine), torch.device("cpu"))
    samples = torch.arange(SAMPLES).chunk(dp.size())[dp.rank()]
    everyone[rows[:, None], samples] = weights.detach().view(len(mine), -1, EXPERTS)
    return everyone


@pytest.mark.parametrize("kind", NOISES, ids=lambda kind: kind.kind)
def test_every_layout_draws_the_same_noise(kind: Any, pool: GlooPool) -> None:
    (alone,) = pool.run(1, noisy_weights, kind, ALONE)
    assert not bool(alone.isnan().any())
    for processes, parallel in LAYOUTS.values():
        for part in pool.run(processes, noisy_weights, kind, parallel):
            here = ~part.isnan()
            # The gate's matrix product may add in another order for fewer rows.
            assert torch.allclose(part[here], alone[here], atol=1e-6)


@pytest.mark.parametrize("kind", NOISES, ids=lambda kind: kind.kind)
def test_noise_is_of_its_layer_and_of_training(kind: Any, pool: GlooPool) -> None:
    (layer2,) = pool.run(1, noisy_weights, kind, ALONE, 2)
    (layer3,) = pool.run(1, noisy_weights, kind, ALONE, 3)
    (evaluated,) = pool.run(1, noisy_weights, kind, ALONE, 2, False)
    (quiet,) = pool.run(1, noisy_weights, None, ALONE, 2)
    assert not torch.equal(layer2, layer3)
    assert not torch.equal(layer2, quiet)
    assert torch.equal(evaluated, quiet)


def noise_by_hand(kind: Any, precision: str) -> tuple[Tensor, Tensor]:
    """Routing weights of a noisy router, and the papers' formulas in float64 with the same random numbers."""
    model = tiny_model(moe=True, moe_router_noise=kind, moe_aux_loss_coeff=0.0)
    router = build_router(model, precision=precision)
    sample_seeds.hand_down(torch.arange(SAMPLES))
    hidden = hidden_states().to(router.weight.dtype)
    weights, _ = router(hidden)
    keys, tokens = noise.token_keys(torch.arange(SAMPLES), torch.arange(LENGTH), 2), hidden.flatten(0, 1)
    if isinstance(kind, InputJitter):
        # The factor is rounded to the dtype of the tokens, as the product is.
        tokens = tokens * (1 + kind.eps * (2 * noise.uniform(keys, HIDDEN) - 1)).to(tokens.dtype)
    tokens = tokens.double()
    noisy = normalize_gating_logits(tokens @ router.weight.t().double(), GatingNormalization())
    if isinstance(kind, GumbelNoise):
        noisy = noisy + kind.scale * noise.gumbel(keys, EXPERTS).double()
    elif isinstance(kind, LearnedNoise):
        deviation = (1 + (tokens @ router.noise_weight.t().double()).exp()).log()
        noisy = noisy + noise.normal(keys, EXPERTS).double() * deviation
    best = noisy.topk(2, dim=-1)
    expected = torch.zeros_like(noisy).scatter(1, best.indices, best.values.softmax(dim=-1))
    return weights.detach(), expected.detach()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", NOISES, ids=lambda kind: kind.kind)
def test_noise_is_its_papers_formula(kind: Any, precision: str, pool: GlooPool) -> None:
    """The gate is fp32 in both precisions, of bf16 tokens and weights in one."""
    ((measured, expected),) = pool.run(1, noise_by_hand, kind, precision)
    assert torch.allclose(measured.double(), expected, atol=1e-5)
