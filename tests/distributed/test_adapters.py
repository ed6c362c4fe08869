"""Adapters train in every layout what one process trains, and leave the base as it is."""

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
    MultiLatentAttention,
    ParallelConfig,
    Precision,
    RecomputeConfig,
)
from megatron_ext.mcore.adapters.plan import adapters_off
from megatron_ext.proving.parity import Cell, Trajectory, build_cell, compare, run_layout, train_cell
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from tests.distributed.layouts import TOLERANCE, GridCase, layout

ADAPTERS = LoraConfig(
    targets=[
        LoraTarget(match=["q", "down"], rank=2, alpha=8.0),
        LoraTarget(match=["layers.*", "embedding.*", "output_layer"], rank=4, alpha=8.0),
    ],
    lr_ratio=4.0,
)
LATENT = MultiLatentAttention(kv_lora_rank=24, q_lora_rank=40, qk_head_dim=8, qk_pos_emb_head_dim=8, v_head_dim=8)
LATENT_ATTENTION: dict[str, Any] = {"multi_latent_attention": LATENT, "num_query_groups": None}
MODELS = {
    "dense": tiny_model(),
    "latent": tiny_model(**LATENT_ATTENTION),
    "MoE": tiny_model(moe=True),
    "latent MoE": tiny_model(moe=True, **LATENT_ATTENTION),
}
# In the suite each way of splitting is met once: without sequence parallelism, and with everything at once.
CELLS = [
    ("latent", layout("TP2", 2, tp=2), False),
    ("MoE", layout("TP2 SP PP2 EP2 ETP1", 4, tp=2, sp=True, pp=2, ep=2, etp=1), True),
]
PRODUCT = [
    ("dense", layout("TP2", 2, tp=2), True),
    ("dense", layout("TP2 SP", 2, tp=2, sp=True), False),
    ("dense", layout("TP2 SP PP2 DP2", 8, tp=2, sp=True, pp=2), True),
    ("dense", layout("CP2 DP2", 4, cp=2), False),
    ("MoE", layout("DP2", 2), False),
    ("MoE", layout("EP2", 2, ep=2), True),
    ("MoE", layout("PP2 VPP2 EP2", 4, pp=2, vpp=2, ep=2), False),
    ("MoE", layout("TP2 SP EP2 ETP1", 2, tp=2, sp=True, ep=2, etp=1), False),
    ("latent MoE", layout("TP2 SP CP2 EP2 ETP1", 4, tp=2, sp=True, cp=2, ep=2, etp=1), True),
]


def cell_of(kind: str) -> Cell:
    plain = ParallelConfig(use_distributed_optimizer=False)
    return Cell(MODELS[kind], plain, steps=3, adapters=ADAPTERS)


@pytest.fixture(scope="module")
def references(pool: GlooPool) -> dict[str, Trajectory]:
    """Filled with each model on one process, as cells ask for it."""
    return {}


@pytest.mark.parametrize(
    ("kind", "entry", "recomputes"),
    [*CELLS, *(pytest.param(*cell, marks=pytest.mark.product) for cell in PRODUCT)],
    ids=lambda value: getattr(value, "name", str(value)).replace(" ", "-"),
)
def test_adapters_train_as_on_one_process(
    kind: str, entry: GridCase, recomputes: bool, pool: GlooPool, references: dict[str, Trajectory]
) -> None:
    """Recompute on every other: behind a frozen embedding it would compute no gradient at all."""
    cell = cell_of(kind)
    if kind not in references:
        references[kind] = run_layout(pool, cell, 1)
    recompute = RecomputeConfig(granularity="full") if recomputes else RecomputeConfig()
    parallel = replace(entry.parallel, use_distributed_optimizer=recomputes)
    measured = run_layout(pool, replace(cell, parallel=parallel, recompute=recompute), entry.processes)
    difference = compare(measured, references[kind])
    print(f"{kind} {entry.name}: loss {difference.loss:.1e}, gradient norm {difference.norm:.1e}")
    assert min(references[kind].norms) > 0.1
    assert difference.worst < TOLERANCE


@pytest.mark.product
@pytest.mark.parametrize("layer", [0, 3])
def test_a_stage_without_adapters_trains_nothing(layer: int, pool: GlooPool) -> None:
    """Its layers pass gradients on, recomputed or not; a tied embedding is frozen on both stages."""
    adapters = LoraConfig(targets=[LoraTarget(match=[f"layers.{layer}.*"], rank=4)])
    tied = tiny_model(moe=True, untie_embeddings_and_output_weights=False)
    cell = replace(cell_of("MoE"), model=tied, adapters=adapters)
    split = replace(cell, parallel=layout("PP2 EP2", 4, pp=2, ep=2).parallel)
    recomputed = replace(split, recompute=RecomputeConfig(granularity="full"))
    assert compare(run_layout(pool, recomputed, 4), run_layout(pool, cell, 1)).worst < TOLERANCE


def first_moves(ratio: float) -> tuple[float, float]:
    """How far the first step moves the halves A and B, on the average."""
    adapters = replace(ADAPTERS, lr_ratio=ratio)
    cell = replace(cell_of("dense"), parallel=ParallelConfig(), adapters=adapters, steps=1)
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
