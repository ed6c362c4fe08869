"""The router: what moves its bias and coefficients, what a capacity drops, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.config import (
    AdaptiveAuxLoss,
    ParallelConfig,
)
from megatron_ext.errors import CheckpointError
from megatron_ext.mcore.moe import balance
from megatron_ext.mcore.moe.router import require_directions
from megatron_ext.mcore.moe.steps import RouterSteps
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from tests.unit.mcore.moe.gates import ALONE, EXPERTS, HIDDEN, LAYOUTS, LENGTH, build_router, hidden_states, my_part

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
    steps = RouterSteps([router], is_writer=True)
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    violation = []
    for _ in range(200):
        steps.begin()
        _, chosen = router(hidden)
        load = chosen.sum(dim=0).float()
        violation.append(float(load.max() / load.mean() - 1))
        steps.commit(group)
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
