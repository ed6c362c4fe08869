"""Adapters leave the base as it is, where all of it, or a stage, has none too. Their layouts: test_parity.py."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ext.canonical.adapters import LORA
from megatron_ext.config import (
    Bf16Precision,
    Fp8Precision,
    LoraConfig,
    LoraTarget,
    ModelConfig,
    ParallelConfig,
    Precision,
    RecomputeConfig,
)
from megatron_ext.mcore.adapters.plan import adapters_off
from megatron_ext.proving.parity import Cell, build_cell, compare, run_layout, train_cell
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from tests.distributed.layouts import ADAPTERS, TOLERANCE, layout


def cell_of(model: ModelConfig, adapters: LoraConfig = ADAPTERS) -> Cell:
    plain = ParallelConfig(use_distributed_optimizer=False)
    return Cell(model, plain, steps=3, adapters=adapters)


@pytest.mark.product
@pytest.mark.parametrize("layer", [0, 3])
def test_a_stage_without_adapters_trains_nothing(layer: int, pool: GlooPool) -> None:
    """Its layers pass gradients on, recomputed or not; a tied embedding is frozen on both stages."""
    adapters = LoraConfig(targets=[LoraTarget(match=[f"layers.{layer}.*"], rank=4)])
    tied = tiny_model(moe=True, untie_embeddings_and_output_weights=False)
    cell = cell_of(tied, adapters)
    split = replace(cell, parallel=layout("PP2 EP2", 4, pp=2, ep=2).parallel)
    recomputed = replace(split, recompute=RecomputeConfig(granularity="full"))
    assert compare(run_layout(pool, recomputed, 4), run_layout(pool, cell, 1)).worst < TOLERANCE


def first_moves(ratio: float) -> tuple[float, float]:
    """How far the first step moves the halves A and B, on the average."""
    adapters = replace(ADAPTERS, lr_ratio=ratio)
    cell = replace(cell_of(tiny_model(), adapters), parallel=ParallelConfig(), steps=1)
    trainable, groups = build_cell(cell)
    before = {shard.key: shard.data.clone() for shard in trainable.saved_weights()}
    train_cell(cell, trainable, groups)
    moves: dict[str, list[float]] = {"A": [], "B": []}
    for shard in trainable.saved_weights():
        moves[shard.key[-1]].append(float((shard.data - before[shard.key]).abs().mean()))
    trainable.release()
    return sum(moves["A"]) / len(moves["A"]), sum(moves["B"]) / len(moves["B"])


def test_output_halves_learn_at_their_own_rate(pool: GlooPool) -> None:
    """Also where the distributed optimizer updates shards of them."""
    (a, b), (same, more) = (pool.run(2, first_moves, ratio)[0] for ratio in (1.0, 4.0))
    assert same == pytest.approx(a, rel=1e-3)
    assert more == pytest.approx(4 * b, rel=1e-3)


def train_beside_frozen(precision: Precision) -> dict[str, Any]:
    """Train adapters beside a MoE model whose expert biases would move, and look at what moved and what there is."""
    model = tiny_model(
        moe=True,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_gating_normalization=None,
    )
    cell = Cell(model, ParallelConfig(), precision, steps=2, adapters=ADAPTERS)
    trainable, groups = build_cell(cell)
    (chunk,) = trainable.chunks
    shards = {s.key + str(s.offset): s.data.clone() for s in trainable.base_weights() + trainable.saved_weights()}
    trajectory = train_cell(cell, trainable, groups)
    moved = {
        s.key
        for s in trainable.base_weights() + trainable.saved_weights()
        if not torch.equal(shards[s.key + str(s.offset)], s.data)
    }
    trained = sum(p.numel() for p in chunk.parameters() if p.requires_grad)
    states = sum(len(part.optimizer.state) for part in trainable.optimizer.chained_optimizers)
    mains = sum(p.numel() for part in trainable.optimizer.chained_optimizers for p in part.optimizer.state)
    tokens = torch.arange(32).view(1, 32)
    chunk.eval()
    with torch.no_grad():
        adapted = chunk(tokens, tokens, None)
        with adapters_off(trainable.chunks):
            base = chunk(tokens, tokens, None)
        again = chunk(tokens, tokens, None)
    return {
        "losses": trajectory.losses,
        "moved": moved,
        "saved": {s.key for s in trainable.saved_weights()},
        "trained": (trained, mains, states, sum(p.requires_grad for p in chunk.parameters())),
        "off": float((adapted - base).abs().max()),
        "on again": torch.equal(adapted, again),
    }


@pytest.mark.parametrize(
    "precision", [Bf16Precision(kind="bf16"), Fp8Precision(kind="fp8")], ids=lambda precision: precision.kind
)
def test_the_base_stays_as_it_is(precision: Precision, pool: GlooPool) -> None:
    (found,) = pool.run(1, train_beside_frozen, precision)
    assert all(torch.isfinite(torch.tensor(found["losses"])))
    assert all(LORA in key for key in found["moved"])
    assert found["moved"] == found["saved"], "every adapter has a gradient, and is saved"
    trained, mains, states, parameters = found["trained"]
    assert (mains, states) == (trained, parameters), "the optimizer has the adapters' state, and no other"
    assert found["off"] > 1e-3
    assert found["on again"]
