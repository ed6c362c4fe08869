"""What preference optimisation turns off of a model: all that would make policy and reference two functions."""

from dataclasses import replace

import pytest
import torch

from megatron_ext.config import (
    GumbelNoise,
    LearnedNoise,
    LoraConfig,
    LoraTarget,
    PreferenceTask,
    SftTask,
)
from megatron_ext.config.preference import adapters_as, trained_as, turned_off
from megatron_ext.mcore.moe import sample_seeds
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from tests.unit.mcore.moe.gates import EXPERTS, SAMPLES, build_router, hidden_states

TASK = PreferenceTask(kind="preference")
NOISY = replace(
    tiny_model(moe=True),
    hidden_dropout=0.1,
    moe_gating_normalization=None,
    moe_expert_capacity_factor=1.0,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_noise=GumbelNoise(kind="gumbel"),
)


def test_the_model_is_trained_without_what_is_drawn_and_what_balances() -> None:
    still = trained_as(TASK, NOISY)
    assert (still.hidden_dropout, still.moe_expert_capacity_factor, still.moe_aux_loss_coeff) == (0.0, None, 0.0)
    assert trained_as(replace(TASK, balance_losses=True), NOISY).moe_aux_loss_coeff == NOISY.moe_aux_loss_coeff
    both = replace(NOISY, moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"], moe_aux_loss_coeff=[0.1, 0.2])
    assert trained_as(TASK, both).moe_aux_loss_coeff == [0.0, 0.0]
    dropped = LoraConfig(targets=[LoraTarget(dropout=0.5)])
    found = adapters_as(TASK, dropped)
    assert found is not None
    assert found.targets[0].dropout == 0.0
    names = turned_off(TASK, NOISY, dropped)
    assert {"model.hidden_dropout", "model.moe_router_noise", "adapters.targets.N.dropout"} < set(names)
    task = SftTask(kind="sft")
    assert (trained_as(task, NOISY), adapters_as(task, dropped), turned_off(task, NOISY, None)) == (NOISY, dropped, [])


def route(kind: str, still: bool) -> tuple[bool, bool, bool]:
    """Whether routing is that of evaluation, whether the bias would move, and whether it did."""
    noise = GumbelNoise(kind="gumbel") if kind == "gumbel" else LearnedNoise(kind="learned")
    router = build_router(trained_as(TASK, replace(NOISY, moe_router_noise=noise)))
    if still:
        router.hold_still()
    sample_seeds.hand_down(torch.arange(SAMPLES))
    hidden = hidden_states()
    trained = router(hidden)[0].detach()
    follows, before = router.follows_load, torch.zeros(EXPERTS)
    assert router.expert_bias is not None
    router.expert_bias.copy_(before)
    router.update_from_load(torch.arange(EXPERTS).float(), torch.zeros(()))
    moved = not torch.equal(router.expert_bias, before)
    router.expert_bias.copy_(before)
    return torch.equal(trained, router.eval()(hidden)[0].detach()), follows, moved


@pytest.mark.parametrize("kind", ["gumbel", "learned"])
def test_routers_that_hold_still_draw_and_move_nothing(kind: str, pool: GlooPool) -> None:
    assert pool.run(1, route, kind, True) == [(True, False, False)]
    assert pool.run(1, route, kind, False) == [(False, True, True)]
