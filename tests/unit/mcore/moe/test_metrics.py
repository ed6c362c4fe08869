"""MoE health: every layout counts what one process counts."""

import math
from typing import Any

import pytest
import torch

from megatron_ext.config import (
    GatingNormalization,
    ParallelConfig,
    RecomputeConfig,
)
from megatron_ext.mcore.model import routers
from megatron_ext.mcore.moe.counts import RouterCounts, shape_sums
from megatron_ext.mcore.moe.metrics import collect_statistics
from megatron_ext.mcore.moe.selection import normalize_gating_logits
from megatron_ext.proving.parity import Cell, build_cell, train_cell
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from tests.unit.mcore.moe.gates import ALONE


def health(parallel: ParallelConfig, recompute: str | None, changes: dict[str, Any]) -> dict[int, Any]:
    """Train one step and collect what the routers counted."""
    cell = Cell(tiny_model(moe=True, **changes), parallel, recompute=RecomputeConfig(granularity=recompute), steps=1)
    trainable, groups = build_cell(cell)
    train_cell(cell, trainable, groups)
    gates = routers(trainable.chunks)
    statistics = collect_statistics(
        gates, num_layers=4, num_experts=4, num_microbatches=8, group=groups.world, device=torch.device("cpu")
    )
    assert all(router.counts.sums is None for router in gates), "counts are reset"
    trainable.release()
    return statistics


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
    counts.add(torch.full((8,), 50_000.0), torch.zeros(()), len(probabilities), shape_sums(probabilities))
    assert counts.sums is not None
    _, tokens, entropy, top1, ratio = (float(x) for x in counts.sums[8:13])
    assert top1 / tokens == pytest.approx(0.373, abs=2e-3)
    assert entropy / tokens / math.log(8) == pytest.approx(0.821, abs=2e-3)
    assert ratio / tokens == pytest.approx(2.06, abs=2e-2)
