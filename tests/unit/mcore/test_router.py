"""The router: losses against autograd in float64, noise, capacity, bias, adaptive coefficients, and what it counts."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection
from torch import Tensor

from megatron_ext.config import (
    AdaptiveAuxLoss,
    Bf16Precision,
    Fp32Precision,
    GatingNormalization,
    GumbelNoise,
    InputJitter,
    LearnedNoise,
    ModelConfig,
    ParallelConfig,
    RecomputeConfig,
    RuntimeConfig,
)
from megatron_ext.errors import CheckpointError
from megatron_ext.mcore.model import routers
from megatron_ext.mcore.moe import balance, noise
from megatron_ext.mcore.moe.metrics import RouterCounts, collect_statistics
from megatron_ext.mcore.moe.router import Router, _GatingLinear, require_directions
from megatron_ext.mcore.moe.selection import normalize_gating_logits
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.parity import Cell, run_cell
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import random_batch, tiny_model

LENGTH, SAMPLES, HIDDEN, EXPERTS = 16, 4, 64, 4
ALONE = ParallelConfig()
TP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
TP2_EP2 = replace(TP2, expert_model_parallel_size=2, expert_tensor_parallel_size=1)
PRECISIONS = {"fp32": Fp32Precision(kind="fp32"), "bf16": Bf16Precision(kind="bf16")}


def build_router(model: ModelConfig, parallel: ParallelConfig = ALONE, precision: str = "fp32") -> Router:
    """A router of layer 2 in training, with the same random weights everywhere."""
    split_process_group(parallel, RuntimeConfig(device="cpu"))
    seed_everything(0)
    config = transformer_config(model, parallel, PRECISIONS[precision], RecomputeConfig())
    router = Router(config=config, pg_collection=get_default_pg_collection(), model=model)
    router.set_layer_number(2)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in router.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return router.train()


def hidden_states() -> Tensor:
    """[S, samples, H]"""
    return torch.randn(LENGTH, SAMPLES, HIDDEN, generator=torch.Generator().manual_seed(3))


def my_part(hidden: Tensor, router: Router) -> Tensor:
    """This rank's tokens: its data-parallel rank's samples and its part of their sequences."""
    dp = parallel_state.get_data_parallel_group()
    samples = hidden.chunk(dp.size(), dim=1)[dp.rank()]
    return samples[router.grid.positions(LENGTH // router.grid.splits, torch.device("cpu"))]


def loss_gradient(model: ModelConfig, parallel: ParallelConfig, precision: str = "fp32") -> Tensor:
    """Gradient of the router's weight from its losses alone, reduced as in training."""
    router = build_router(model, parallel, precision)
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1) * parallel.context_parallel_size
    hidden = hidden_states().to(router.weight.dtype)
    weights, _ = router(my_part(hidden, router))
    (weights * 0).sum().backward()
    assert router.weight.grad is not None
    gradient = router.weight.grad.float()
    dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
    data = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist.all_reduce(gradient, group=data)
    return gradient / data.size()


def formula_gradient(model: ModelConfig, micro_batches: int, precision: str = "fp32") -> Tensor:
    """The same from the papers' formulas, in float64 over all tokens at once."""
    weight = build_router(model, precision=precision).weight.detach().double().requires_grad_()
    hidden = hidden_states().to(torch.bfloat16 if precision == "bf16" else torch.float32).double()
    parts = [formula_parts(model, hidden_SBH @ weight.t()) for hidden_SBH in hidden.chunk(micro_batches, dim=1)]
    total = torch.zeros((), dtype=torch.float64)
    everywhere = torch.stack([counts.sum(dim=0) for _, _, counts in parts]).sum(dim=0)
    for raw, probabilities_SBE, counts_BE in parts:
        mean_BE = probabilities_SBE.mean(dim=0)
        share = {
            "aux_loss": counts_BE.sum(dim=0) / counts_BE.sum(),
            "seq_aux_loss": counts_BE / counts_BE.sum(dim=-1, keepdim=True),
            "global_aux_loss": everywhere / everywhere.sum(),
        }
        for kind, coefficient in model.balance_losses.items():
            total = total + coefficient * EXPERTS * (share[kind] * mean_BE).sum(dim=-1).mean() / micro_batches
        total = total + model.moe_z_loss_coeff * raw.exp().sum(dim=-1).log().square().mean() / micro_batches
    (gradient,) = torch.autograd.grad(total, weight)
    return gradient


def formula_parts(model: ModelConfig, raw_SBE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and probabilities [S, B, E], and how often each sequence chose each expert [B, E]."""
    logits = raw_SBE
    if model.moe_gating_normalization is not None:
        deviation = raw_SBE.std(dim=-1, keepdim=True) + model.moe_gating_normalization.eps
        logits = (raw_SBE - raw_SBE.mean(dim=-1, keepdim=True)) / deviation
    if model.moe_router_score_function == "sigmoid":
        probabilities = torch.sigmoid(logits) / torch.sigmoid(logits).sum(dim=-1, keepdim=True)
    else:
        probabilities = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    best = logits.topk(model.moe_router_topk, dim=-1).indices
    counts = torch.zeros_like(logits).scatter(-1, best, 1.0).sum(dim=0)
    return raw_SBE, probabilities, counts


def with_loss(kinds: str | list[str], coefficients: Any, **changes: Any) -> ModelConfig:
    return tiny_model(moe=True, moe_router_load_balancing_type=kinds, moe_aux_loss_coeff=coefficients, **changes)


LOSSES = {
    "aux_loss": with_loss("aux_loss", 1.0),
    "seq_aux_loss": with_loss("seq_aux_loss", 1.0),
    "global_aux_loss": with_loss("global_aux_loss", 1.0),
    "z_loss": with_loss("none", 0.0, moe_z_loss_coeff=1.0),
    "list": with_loss(["seq_aux_loss", "global_aux_loss", "aux_loss"], [0.5, 2.0, 0.1], moe_z_loss_coeff=0.3),
    "without gating norm": with_loss("aux_loss", 1.0, moe_gating_normalization=None),
    "sigmoid with bias": with_loss(
        "seq_aux_loss", 1.0, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True
    ),
}
LAYOUTS = {
    "one process": (1, ALONE),
    "TP2": (2, TP2),
    "DP2": (2, ALONE),
    "EP2": (2, replace(ALONE, expert_model_parallel_size=2)),
    "TP2 DP2 EP2": (4, TP2_EP2),
    "CP2": (2, replace(ALONE, context_parallel_size=2)),
    "TP2 CP2": (4, replace(TP2, context_parallel_size=2)),
}


def relative(measured: Tensor, expected: Tensor) -> float:
    return float((measured - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_of_each_loss_is_the_formulas(loss: str, layout: str, pool: GlooPool) -> None:
    processes, parallel = LAYOUTS[layout]
    micro_batches = processes // (parallel.tensor_model_parallel_size * parallel.context_parallel_size)
    (expected,) = pool.run(1, formula_gradient, LOSSES[loss], micro_batches)
    for measured in pool.run(processes, loss_gradient, LOSSES[loss], parallel):
        difference = relative(measured, expected)
        print(f"{loss}, {layout}: {difference:.1e}")
        # fp32: sums over 64 tokens and logits of size 1, roundings of 6e-8 each. Wrong scales are factors of 2.
        assert difference < 1e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_of_each_loss_in_bf16(loss: str, pool: GlooPool) -> None:
    """The gate computes in fp32 from bf16 weights and tokens; only the gradient is rounded, to 2 ** -9 at most."""
    (expected,) = pool.run(1, formula_gradient, LOSSES[loss], 1, "bf16")
    (measured,) = pool.run(1, loss_gradient, LOSSES[loss], ALONE, "bf16")
    assert relative(measured, expected) < 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gating_linear_equals_autograd(dtype: torch.dtype) -> None:
    tokens = torch.randn(7, 5).to(dtype).requires_grad_()
    weight = torch.randn(3, 5).to(dtype).requires_grad_()
    upstream = torch.randn(7, 3)
    measured = torch.autograd.grad(_GatingLinear.apply(tokens, weight), (tokens, weight), upstream)
    expected = torch.autograd.grad(tokens.float() @ weight.float().t(), (tokens, weight), upstream)
    assert all(torch.equal(m, e) for m, e in zip(measured, expected, strict=True))


def global_loss_over_micro_batches() -> tuple[list[float], list[float]]:
    """The global-batch loss of two micro-batches of a step, and of the next step; logged, and by hand."""
    router = build_router(LOSSES["global_aux_loss"])
    logged, by_hand = [], []
    hidden = hidden_states()
    for step in range(2):
        router.begin_step()
        counts = torch.zeros(EXPERTS, dtype=torch.float64)
        for micro_batch in hidden.roll(step, dims=1).chunk(2, dim=1):
            router.counts = RouterCounts(EXPERTS)
            router(micro_batch)
            assert router.counts.sums is not None
            logged.append(float(router.counts.sums[-2]))
            _, probabilities, chosen = formula_parts(router.model, micro_batch.double() @ router.weight.t().double())
            counts += chosen.sum(dim=0)
            by_hand.append(float(EXPERTS * (counts / counts.sum() * probabilities.mean(dim=(0, 1))).sum()))
    return logged, by_hand


def test_global_loss_remembers_the_micro_batches_of_its_step(pool: GlooPool) -> None:
    ((logged, by_hand),) = pool.run(1, global_loss_over_micro_batches)
    assert logged == pytest.approx(by_hand, rel=1e-6)


# Noise


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
    noise.begin_micro_batch(torch.arange(100, 100 + SAMPLES).chunk(dp.size())[dp.rank()])
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
    noise.begin_micro_batch(torch.arange(SAMPLES))
    hidden = hidden_states().to(router.weight.dtype)
    weights, _ = router(hidden)
    keys, tokens = noise.token_keys(torch.arange(LENGTH), 2), hidden.flatten(0, 1)
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


# Balance without a loss, and coefficients that adapt


def test_bias_moves_against_the_load() -> None:
    counts = torch.tensor([10.0, 2.0, 6.0, 6.0])
    moved = balance.moved_bias(torch.tensor([0.1, 0.0, -0.2, 0.0]), counts, rate=0.01)
    assert torch.allclose(moved, torch.tensor([0.09, 0.01, -0.2, 0.0]))


def test_adaptive_coefficient_is_skyworks_formula() -> None:
    adaptive = AdaptiveAuxLoss()
    counts = torch.tensor([60.0, 20.0, 10.0, 10.0])
    alpha = torch.tensor(0.005)
    # Measured drops: d = 10 / 100.
    measured = balance.adapted_coefficient(alpha, counts, torch.tensor(10.0), adaptive, capacity_factor=1.5)
    assert float(measured) == pytest.approx(0.99 * 0.005 + 0.01 * min(0.2 * 0.1, 0.01))
    # Proxy: the capacity of factor 1 is 25, so 35 of 100 would be dropped; the target is cut at alpha_max.
    proxy = balance.adapted_coefficient(alpha, counts, torch.tensor(0.0), adaptive, capacity_factor=None)
    assert float(proxy) == pytest.approx(0.99 * 0.005 + 0.01 * 0.01)
    small = replace(adaptive, xi=0.01)
    proxy = balance.adapted_coefficient(alpha, counts, torch.tensor(0.0), small, capacity_factor=None)
    assert float(proxy) == pytest.approx(0.99 * 0.005 + 0.01 * 0.01 * 0.35)


def load_balanced_by_bias() -> tuple[float, float]:
    """MaxVio of a skewed router before and after 200 steps of moving its bias."""
    model = tiny_model(
        moe=True,
        moe_gating_normalization=None,
        moe_aux_loss_coeff=0.0,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.01,
    )
    router = build_router(model)
    hidden = hidden_states() + router.weight[0].detach() / router.weight[0].detach().norm()
    violation = []
    for _ in range(200):
        balance.begin_step([router])
        _, chosen = router(hidden)
        load = chosen.sum(dim=0).float()
        violation.append(float(load.max() / load.mean() - 1))
        balance.end_step([router], parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    return violation[0], sum(violation[-20:]) / 20


def test_the_bias_balances(pool: GlooPool) -> None:
    ((before, after),) = pool.run(1, load_balanced_by_bias)
    print(f"MaxVio {before:.2f} -> {after:.2f}")
    assert before > 0.4
    assert after < 0.1


def bias_keeps_fp32() -> tuple[torch.dtype, torch.dtype]:
    model = tiny_model(moe=True, moe_router_enable_expert_bias=True)
    router = build_router(model).bfloat16()
    return router.weight.dtype, router.expert_bias.dtype


def test_the_bias_stays_in_fp32(pool: GlooPool) -> None:
    assert pool.run(1, bias_keeps_fp32) == [(torch.bfloat16, torch.float32)]


# Capacity


def kept_assignments(parallel: ParallelConfig, policy: str) -> Tensor:
    """Which assignments a capacity of 0.75 keeps [S, samples, E]; -1 where another rank has the token."""
    model = tiny_model(moe=True, moe_expert_capacity_factor=0.75, moe_token_drop_policy=policy)
    router = build_router(model, parallel)
    mine = my_part(hidden_states()[:, :1], router)
    weights, kept = router(mine)
    assert torch.equal(weights > 0, kept)
    everyone = torch.full((LENGTH, 1, EXPERTS), -1.0)
    everyone[router.grid.positions(len(mine), torch.device("cpu"))] = kept.view(len(mine), 1, EXPERTS).float()
    _, undropped = router.eval()(mine)
    assert bool((undropped.sum(dim=-1) == 2).all()), "evaluation drops nothing"
    return everyone


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_a_layout_does_not_change_what_is_dropped(policy: str, pool: GlooPool) -> None:
    (alone,) = pool.run(1, kept_assignments, ALONE, policy)
    assert float(alone.sum(dim=(0, 1)).max()) == 6, "0.75 of a mean load of 16 * 2 / 4 = 8"
    for processes, parallel in (LAYOUTS["TP2"], LAYOUTS["CP2"], LAYOUTS["TP2 CP2"]):
        parts = torch.stack(pool.run(processes, kept_assignments, parallel, policy)).amax(dim=0)
        assert torch.equal(parts, alone)


# What is refused


def refusal(equal: bool) -> str | None:
    router = build_router(tiny_model(moe=True))
    with torch.no_grad():
        router.weight.copy_(torch.ones_like(router.weight) if equal else torch.eye(EXPERTS, HIDDEN))
    try:
        require_directions([router])
    except CheckpointError as error:
        return str(error)
    return None


def test_a_router_without_directions_is_refused(pool: GlooPool) -> None:
    (message,) = pool.run(1, refusal, True)
    assert message is not None
    assert "the routers of layers 2 (counted from 1) have the same weights for every expert" in message
    assert pool.run(1, refusal, False) == [None]


# Counts


def health(parallel: ParallelConfig, recompute: str | None, changes: dict[str, Any]) -> dict[int, Any]:
    """Train one step and collect what the routers counted."""
    from megatron_ext.testing import parity

    kept: list[Any] = []
    real = parity.release_chunks

    def collect(wrapped: list[Any]) -> None:
        gates = routers(wrapped)
        world = dist.group.WORLD
        assert world is not None
        kept.append(
            collect_statistics(
                gates, num_layers=4, num_experts=4, num_microbatches=8, group=world, device=torch.device("cpu")
            )
        )
        assert all(router.counts.sums is None for router in gates), "counts are reset"
        real(wrapped)

    parity.release_chunks = collect
    try:
        cell = Cell(
            tiny_model(moe=True, **changes), parallel, recompute=RecomputeConfig(granularity=recompute), steps=1
        )
        run_cell(cell)
    finally:
        parity.release_chunks = real
    return kept[0]


COUNTED = {
    "dp2": (2, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
}


@pytest.mark.parametrize("name", COUNTED)
def test_every_layout_counts_what_one_process_counts(name: str, pool: GlooPool) -> None:
    changes = {"moe_expert_capacity_factor": 0.9, "moe_z_loss_coeff": 1e-3}
    (alone,) = pool.run(1, health, ALONE, None, changes)
    assert sorted(alone) == [1, 2, 3], "the first layer is dense"
    processes, degrees = COUNTED[name]
    for other in pool.run(processes, health, ParallelConfig(**degrees), None, changes):
        for layer, expected in alone.items():
            assert other[layer].load == expected.load
            assert other[layer].drop_rate == expected.drop_rate > 0
            figures = [
                (h.entropy, h.top1, h.max1_max2, h.losses["aux_loss"], h.losses["z_loss"])
                for h in (other[layer], expected)
            ]
            assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_recomputed_tokens_are_counted_once(pool: GlooPool) -> None:
    assert pool.run(1, health, ALONE, "full", {}) == pool.run(1, health, ALONE, None, {})


def test_health_has_the_simulated_values() -> None:
    """8 experts with normalized standard normal logits: the reference simulation's means."""
    logits = torch.randn(200_000, 8, generator=torch.Generator().manual_seed(0))
    probabilities = normalize_gating_logits(logits, GatingNormalization()).softmax(dim=-1)
    counts = RouterCounts(8)
    counts.add(torch.full((8,), 50_000.0), torch.zeros(()), probabilities)
    assert counts.sums is not None
    _, tokens, entropy, top1, ratio = (float(x) for x in counts.sums[8:13])
    assert top1 / tokens == pytest.approx(0.373, abs=2e-3)
    assert entropy / tokens / math.log(8) == pytest.approx(0.821, abs=2e-3)
    assert ratio / tokens == pytest.approx(2.06, abs=2e-2)


def test_random_batches_are_the_same_everywhere() -> None:
    one = random_batch(3, samples=4, micro_batch=1, dp_rank=1, dp_size=2)
    two = random_batch(3, samples=4, micro_batch=1, dp_rank=0, dp_size=1)
    assert torch.equal(one[0].tokens, two[1].tokens)
    assert torch.equal(one[0].seeds, two[1].seeds)
