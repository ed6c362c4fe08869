"""Models with the features of the field's architectures train alike in every layout and continue in any other."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_ext.canonical.catalogue import CanonicalTensor, Normal, model_shapes
from megatron_ext.canonical.seeds import seed_from_name
from megatron_ext.checkpoint.find import require_checkpoint
from megatron_ext.checkpoint.streams import MegatronSource
from megatron_ext.config import (
    ModelConfig,
    ParallelConfig,
    RecomputeConfig,
)
from megatron_ext.mcore import initialization
from megatron_ext.mcore.state import ParameterShard
from megatron_ext.proving.parity import Cell, Trajectory, compare, run_cell
from megatron_ext.testing.pool import GlooPool
from tests.distributed.architectures import MODELS
from tests.distributed.layouts import TOLERANCE, GridCase, layout
from tests.distributed.runs import Part, load_and_save_to, started_otherwise, train_and_save
from tests.distributed.tensors import assert_same_tensors

ALONE = GridCase("one process", 1, ParallelConfig(use_distributed_optimizer=False))
DP2, PP2, TP2 = layout("DP2", 2), layout("PP2", 2, pp=2), layout("TP2", 2, tp=2)
TP2_SP = layout("TP2 SP", 2, tp=2, sp=True)
TP2_SP_PP2 = layout("TP2 SP PP2", 4, tp=2, sp=True, pp=2)
TP2_SP_CP2_PP2 = layout("TP2 SP CP2 PP2", 8, tp=2, sp=True, cp=2, pp=2)
EP2, ETP2 = layout("EP2", 2, ep=2), layout("TP2 SP EP2 ETP2", 4, tp=2, sp=True, ep=2, etp=2)
ETP2_GATHER = layout("EP2 ETP2 all-gather", 4, tp=2, sp=True, ep=2, etp=2, dispatch="allgather")
ETP1_PP2 = layout("TP2 SP PP2 EP2 ETP1", 4, tp=2, sp=True, pp=2, ep=2, etp=1)

LAYOUTS = {
    "gpt2-moe": (DP2, PP2, TP2_SP, EP2, ETP2, ETP2_GATHER, ETP1_PP2),
    "qwen3": (DP2, PP2, TP2, TP2_SP, TP2_SP_PP2),
    "olmoe": (TP2_SP_CP2_PP2, ETP2, ETP1_PP2),
    "deepseek": (TP2_SP, ETP1_PP2),
    "dense deepseek": (TP2, TP2_SP_PP2),
}
CASES = [(name, entry) for name, layouts in LAYOUTS.items() for entry in layouts]
FULL = RecomputeConfig(granularity="full")
SELECTIVE = RecomputeConfig(granularity="selective", modules=["core_attn", "mlp"])


def run_drawn(cell: Cell) -> Trajectory:
    """Train from weights in which no bias is 0 and no norm is 1, so that a misplaced one shows from the first step."""
    real = initialization._draw

    def drawn(tensor: CanonicalTensor, piece: ParameterShard, seed: int) -> torch.Tensor:
        value = real(tensor, piece, seed)
        if not isinstance(tensor.initial, Normal) or tensor.initial.std:
            return value
        normal = replace(tensor, initial=Normal(0.0, cell.model.init_method_std))
        return value + 10 * real(normal, replace(piece, key=f"drawn {seed_from_name(0, piece.key)}"), seed)

    with mock.patch.object(initialization, "_draw", drawn):
        return run_cell(cell)


def train(pool: GlooPool, model: ModelConfig, entry: GridCase, recompute: RecomputeConfig) -> Trajectory:
    trajectories = pool.run(
        entry.processes, run_drawn, Cell(model, entry.parallel, recompute=recompute, steps=3, samples=4)
    )
    assert all(t == trajectories[0] for t in trajectories)
    return trajectories[0]


@pytest.fixture(scope="module")
def references(pool: GlooPool) -> dict[str, Trajectory]:
    """Each model on one process."""
    return {name: train(pool, model, ALONE, RecomputeConfig()) for name, model in MODELS.items()}


@pytest.mark.parametrize(("name", "entry"), CASES, ids=[f"{name}-{entry.name}" for name, entry in CASES])
def test_layout_equals_one_process(
    name: str, entry: GridCase, pool: GlooPool, references: dict[str, Trajectory]
) -> None:
    difference = compare(train(pool, MODELS[name], entry, RecomputeConfig()), references[name])
    print(f"{name} {entry.name}: relative differences: loss {difference.loss:.1e}, gradient norm {difference.norm:.1e}")
    assert difference.worst < TOLERANCE


@pytest.mark.parametrize("recompute", [FULL, SELECTIVE], ids=["full", "selective"])
@pytest.mark.parametrize("name", MODELS)
def test_recompute_changes_nothing(
    name: str, recompute: RecomputeConfig, pool: GlooPool, references: dict[str, Trajectory]
) -> None:
    assert train(pool, MODELS[name], ALONE, recompute) == references[name]


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_hold_the_models_tensors_and_survive_another_layout(
    name: str, pool: GlooPool, tmp_path: Path
) -> None:
    before, after = LAYOUTS[name][-1], LAYOUTS[name][-2]
    part = Part(MODELS[name], tmp_path / "a", before.parallel, "bf16")
    pool.run(before.processes, train_and_save, part, 1)
    pool.run(
        after.processes, load_and_save_to, replace(started_otherwise(part), parallel=after.parallel), tmp_path / "b"
    )
    first, second = (require_checkpoint(tmp_path / folder) for folder in "ab")
    assert_same_tensors(first, second)
    assert {n: spec.shape for n, spec in MegatronSource(first).specs.items()} == model_shapes(MODELS[name])
