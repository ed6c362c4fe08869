"""A checkpoint of any layout continues in any other, bit for bit where the layout is the same, and fails closed."""

import itertools
import math
import multiprocessing
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron_ext.checkpoint.find import TRACKER_FILE, find_checkpoint, require_checkpoint
from megatron_ext.checkpoint.state_file import read_state
from megatron_ext.checkpoint.streams import MegatronSource
from megatron_ext.config import AdaptiveAuxLoss, LearnedNoise, ModelConfig, ParallelConfig
from megatron_ext.errors import CheckpointError, TrainingError
from megatron_ext.mcore.state import model_shards
from megatron_ext.testing.pool import GlooPool, WorkerFailure
from megatron_ext.testing.tiny import tiny_model
from megatron_ext.training.session import Session
from tests.distributed.runs import (
    Part,
    load_and_save_to,
    open_part,
    resumed_random_states,
    started_otherwise,
    train_and_save,
    train_steps,
)
from tests.distributed.tensors import assert_same_tensors, tensors_of
from tests.support.product import alternating

# As in the parity grid: another layout adds in another order. Largest difference seen 2e-7.
TOLERANCE = 1e-5

DENSE, MOE = tiny_model(), tiny_model(moe=True)
SIX = tiny_model(moe=True, num_layers=6)
# Everything that a router keeps between steps.
ROUTER = tiny_model(
    moe=True,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_noise=LearnedNoise(kind="learned"),
    moe_adaptive_aux_loss=AdaptiveAuxLoss(beta=0.5),
    moe_expert_capacity_factor=0.9,
    moe_shared_expert_gate=True,
)
TIED = tiny_model(untie_embeddings_and_output_weights=False)
ALONE = ParallelConfig(use_distributed_optimizer=False)
DP = ParallelConfig()
TP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
VPP = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
EP = ParallelConfig(expert_model_parallel_size=2)
EP_PP = ParallelConfig(expert_model_parallel_size=2, pipeline_model_parallel_size=2)
ETP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2)
ETP1 = replace(ETP2, expert_tensor_parallel_size=1)
# Layers are not a multiple of the chunks: the first chunk and the last have one less.
UNEVEN = replace(VPP, account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True)
ALL = replace(ETP1, pipeline_model_parallel_size=2)
CP = ParallelConfig(context_parallel_size=2)
CP_EP = replace(ETP1, context_parallel_size=2)

MOVES = {
    "dense: DP2 to TP2 SP": (DENSE, (DP, 2), (TP, 2)),
    "dense: TP2 SP to PP2 VPP2": (DENSE, (TP, 4), (VPP, 2)),
    "dense: PP2 VPP2 to DP4": (DENSE, (VPP, 2), (DP, 4)),
    "dense: distributed to plain optimizer": (DENSE, (DP, 4), (replace(TP, use_distributed_optimizer=False), 2)),
    "dense: plain to distributed optimizer": (DENSE, (ALONE, 1), (DP, 2)),
    "tied: PP2 VPP2 to TP2 SP": (TIED, (VPP, 2), (TP, 2)),
    "MoE: TP2 SP EP2 ETP1 to PP2 EP2": (MOE, (ETP1, 4), (EP_PP, 4)),
    "MoE: TP2 SP EP2 ETP2 to one process": (MOE, (ETP2, 4), (ALONE, 1)),
    "MoE: one process to TP2 SP PP2 EP2 ETP1": (MOE, (ALONE, 1), (ALL, 8)),
    "MoE: TP2 SP PP2 EP2 ETP1 to EP2": (MOE, (ALL, 8), (EP, 4)),
    "router state: TP2 SP PP2 EP2 ETP1 to EP2": (ROUTER, (ALL, 8), (EP, 4)),
    "router state: one process to PP2 VPP2": (ROUTER, (ALONE, 1), (VPP, 2)),
    "dense: CP2 to PP2 VPP2": (DENSE, (CP, 2), (VPP, 2)),
    "MoE: one process to CP2 TP2 SP EP2 ETP1": (MOE, (ALONE, 1), (CP_EP, 4)),
    "MoE: CP2 TP2 SP EP2 ETP1 to EP2": (MOE, (CP_EP, 8), (EP, 4)),
    "MoE: EP2, plain optimizer, to PP2 VPP2": (MOE, (replace(EP, use_distributed_optimizer=False), 2), (VPP, 2)),
    "MoE: six layers on uneven PP2 VPP2 to EP2": (SIX, (UNEVEN, 4), (EP, 2)),
}


@pytest.fixture(scope="module")
def uninterrupted(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelConfig], list[Any]]:
    """Loss and gradient norm of four steps of a model on one process; trained once for each model."""

    done: dict[str, list[Any]] = {}

    def train(model: ModelConfig) -> list[Any]:
        if (key := str(model)) not in done:
            part = Part(model, tmp_path_factory.mktemp("whole"), ALONE)
            done[key] = pool.run(1, train_and_save, part, 4, False)[0]
        return done[key]

    return train


# Every move is made by the test below too, in bf16 and bit for bit; of what continues, every second one.
@pytest.mark.parametrize(
    "move", [pytest.param(m, marks=() if n % 2 else pytest.mark.product) for n, m in enumerate(MOVES, start=1)]
)
def test_training_continues_in_another_layout(
    move: str, pool: GlooPool, uninterrupted: Callable[[ModelConfig], list[Any]], tmp_path: Path
) -> None:
    model, (before, processes_before), (after, processes_after) = MOVES[move]
    whole = uninterrupted(model)
    part = Part(model, tmp_path / "run", before)
    first = pool.run(processes_before, train_and_save, part, 2)[0]
    # Other initial weights: whatever is not loaded from the checkpoint would show.
    second = pool.run(processes_after, train_and_save, replace(started_otherwise(part), parallel=after), 4)[0]
    pairs = zip(itertools.chain(*first, *second), itertools.chain(*whole), strict=True)
    difference = max(abs(a - b) / abs(b) for a, b in pairs)
    print(f"{move}: largest relative difference of loss and gradient norm {difference:.1e}")
    assert difference < TOLERANCE


# bf16 has all there is: weights, fp32 master weights and moments.
@pytest.mark.parametrize(("move", "precision"), [*((move, "bf16") for move in MOVES), (next(iter(MOVES)), "fp32")])
def test_every_tensor_survives_another_layout_bit_for_bit(
    move: str, precision: str, pool: GlooPool, tmp_path: Path
) -> None:
    model, (before, processes_before), (after, processes_after) = MOVES[move]
    part = Part(model, tmp_path / "a", before, precision)
    pool.run(processes_before, train_and_save, part, 1)
    pool.run(processes_after, load_and_save_to, replace(started_otherwise(part), parallel=after), tmp_path / "b")
    first, second = (require_checkpoint(tmp_path / name) for name in "ab")
    count = assert_same_tensors(first, second)
    assert read_state(first) == read_state(second)
    weights = len(MegatronSource(first).specs)
    print(f"{move}, {precision}: {count} tensors of {weights} weights equal")


@pytest.mark.parametrize(
    ("case", "precision"),
    alternating([("dense", DENSE, DP, 2), ("MoE", MOE, EP, 2), ("router", ROUTER, ETP1, 4)], ["fp32", "bf16"]),
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_same_layout_continues_bit_for_bit(
    case: tuple[str, ModelConfig, ParallelConfig, int], precision: str, pool: GlooPool, tmp_path: Path
) -> None:
    _, model, parallel, processes = case
    moments = {"exp_avg_dtype": precision, "exp_avg_sq_dtype": precision}
    part = Part(model, tmp_path / "run", parallel, precision, sections=(("optimizer", moments),))
    whole = pool.run(processes, train_and_save, replace(part, directory=tmp_path / "whole"), 4)
    first = pool.run(processes, train_and_save, part, 2)
    second = pool.run(processes, train_and_save, started_otherwise(part), 4)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    assert_same_tensors(tmp_path / "whole" / "iter_0000004", tmp_path / "run" / "iter_0000004")


def test_master_weights_are_kept_at_full_precision(pool: GlooPool, tmp_path: Path) -> None:
    pool.run(2, train_and_save, Part(MOE, tmp_path, DP, "bf16"), 2)
    tensors = tensors_of(require_checkpoint(tmp_path))
    masters = {
        key.removeprefix("optimizer.state.param."): t
        for key, t in tensors.items()
        if key.startswith("optimizer.state.param.")
    }
    assert masters.keys() == {key for key in tensors if not key.startswith("optimizer.")}
    for key, master in masters.items():
        assert master.dtype == torch.float32
        assert tensors[key].dtype == torch.bfloat16 or key.endswith("router.weight")
        assert torch.equal(master.to(tensors[key].dtype), tensors[key])
    weight = masters["embedding.word_embeddings.weight"]
    assert not torch.equal(weight, weight.bfloat16().float()), "master weights hold no more than bf16 would"


def test_coefficients_begin_anew_where_the_checkpoint_has_none(pool: GlooPool, tmp_path: Path) -> None:
    """Adaptive coefficients may be switched on in the middle of a run."""
    pool.run(2, train_and_save, Part(MOE, tmp_path, EP), 1)
    adaptive = replace(MOE, moe_adaptive_aux_loss=AdaptiveAuxLoss(beta=0.5))
    pool.run(2, train_and_save, Part(adaptive, tmp_path, EP), 2)
    tensors = tensors_of(require_checkpoint(tmp_path))
    coefficients = [tensors[f"router.coefficient.aux_loss.{layer}"] for layer in (1, 2, 3)]
    assert min(coefficients) > MOE.balance_losses["aux_loss"] / 2, "half of the old coefficient, and its target"


def test_random_states_are_those_that_were_saved(pool: GlooPool, tmp_path: Path) -> None:
    part = Part(MOE, tmp_path, ETP1)
    pool.run(4, train_and_save, part, 1)
    restored = pool.run(4, resumed_random_states, started_otherwise(part))
    assert all(same for same, _ in restored)


def test_a_new_optimizer_can_be_asked_for(pool: GlooPool, tmp_path: Path) -> None:
    part = Part(MOE, tmp_path / "run", EP)
    pool.run(2, train_and_save, part, 2)
    fresh = replace(part, checkpoint=(("load_optimizer", False),))
    pool.run(2, train_and_save, fresh, 3)
    state = read_state(require_checkpoint(tmp_path / "run"))
    assert (state.iteration, state.consumed_samples, state.optimizer_steps) == (3, 24, 1)


def test_a_run_starts_from_the_weights_of_another(pool: GlooPool, tmp_path: Path) -> None:
    pool.run(2, train_and_save, Part(MOE, tmp_path / "a", EP), 2)
    part = Part(MOE, tmp_path / "b", ETP1, checkpoint=(("initialize_from", str(tmp_path / "a")),))
    pool.run(4, train_and_save, part, 0)
    a, b = MegatronSource(tmp_path / "a"), MegatronSource(tmp_path / "b")
    assert a.specs == b.specs
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.specs)
    state = read_state(require_checkpoint(tmp_path / "b"))
    assert (state.iteration, state.consumed_samples) == (0, 0)


# --- what goes wrong ----------------------------------------------------------------------------------------


def fail_to_save_on_one_rank(part: Part) -> str:
    """Rank 1 may write only a few bytes to a file; return the error of this rank."""
    with open_part(part) as session:
        train_steps(session, 1)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        try:
            session.save()
        except CheckpointError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "saved"


def test_a_save_that_fails_on_one_rank_fails_on_all_and_never_looks_complete(pool: GlooPool, tmp_path: Path) -> None:
    part = Part(DENSE, tmp_path, DP)
    errors = pool.run(2, fail_to_save_on_one_rank, part)
    assert len(set(errors)) == 1
    assert "not saved" in errors[0]
    assert "rank 1: " in errors[0]
    assert find_checkpoint(tmp_path) is None
    # The same command again starts over, and clears up.
    pool.run(2, train_and_save, part, 1)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["iter_0000001", "latest_checkpointed_iteration.txt"]


def test_old_checkpoints_go_when_newer_ones_are_complete(pool: GlooPool, tmp_path: Path) -> None:
    part = Part(DENSE, tmp_path, ALONE, checkpoint=(("keep_last", 2),))
    for step in (1, 2, 3, 4):
        pool.run(1, train_and_save, part, step)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000003", "iter_0000004"]
    assert (tmp_path / TRACKER_FILE).read_text() == "4\n"


def test_another_model_is_refused_by_name_of_the_fields(pool: GlooPool, tmp_path: Path) -> None:
    pool.run(1, train_and_save, Part(MOE, tmp_path, ALONE), 1)
    other = replace(MOE, moe_router_topk=3, num_query_groups=4)
    with pytest.raises(WorkerFailure, match="holds another model") as failure:
        pool.run(1, train_and_save, Part(other, tmp_path, ALONE), 2)
    assert "model.moe_router_topk: 2 in the checkpoint, 3 in this run" in str(failure.value)
    assert "model.num_query_groups: 2 in the checkpoint, 4 in this run" in str(failure.value)


def break_a_gradient(part: Part) -> tuple[str, bool, int]:
    """Poison one gradient; return the error, whether the weights are as they were, and where the run stands."""
    with open_part(part) as session:
        train_steps(session, 1)
        before = [shard.data.clone() for shard in session.checkpoints.tensors()]
        weight = next(session.wrapped[0].parameters())
        if dist.get_rank() == 1:
            session.wrapped[0].zero_grad_buffer = lambda: weight.main_grad.fill_(math.inf)
        try:
            train_steps(session, 2)
        except TrainingError as error:
            after = [shard.data for shard in session.checkpoints.tensors()]
            same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            return str(error), same, session.state.iteration
    return "trained on", False, 2


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_a_step_whose_gradient_is_not_finite_is_not_taken(
    distributed_optimizer: bool, pool: GlooPool, tmp_path: Path
) -> None:
    parallel = ParallelConfig(use_distributed_optimizer=distributed_optimizer)
    for error, same, iteration in pool.run(2, break_a_gradient, Part(MOE, tmp_path, parallel)):
        assert error.startswith("step 2: the loss is ")
        assert "; the weights were not updated. Start again to go on from the newest checkpoint" in error
        assert (same, iteration) == (True, 1)


# --- megatron-core reads and writes the same format ---------------------------------------------------------


def plain_model_state(session: Session) -> dict[str, object]:
    """The model's sharded state dict, as megatron-core makes it."""
    metadata = {"singleton_local_shards": False, "non_homogeneous_layers": True, "dp_cp_group": session.groups.dp_cp}
    return {f"model{n}": chunk.sharded_state_dict(metadata=metadata) for n, chunk in enumerate(session.chunks)}


def load_with_megatron_core(part: Part, checkpoint: Path) -> bool:
    """Overwrite fresh weights by what megatron-core loads from `checkpoint`; compare with what we load."""
    with open_part(part) as session:
        # Its layers ask for Transformer Engine's fp8 state too, which no checkpoint of this backend has.
        loaded = dist_checkpointing.load(plain_model_state(session), str(checkpoint), strict=StrictHandling.LOG_ALL)
        for number, chunk in enumerate(session.chunks):
            chunk.load_state_dict(loaded[f"model{number}"], strict=False)
        measured = {shard.key + str(shard.offset): shard.data.clone() for shard in model_shards(session.chunks)}
        session.resume(checkpoint)
        return all(
            torch.equal(measured[shard.key + str(shard.offset)], shard.data) for shard in model_shards(session.chunks)
        )


def save_with_megatron_core(part: Part, directory: Path) -> None:
    """Save the model with megatron-core and, for comparison, with us."""
    with open_part(part) as session:
        if dist.get_rank() == 0:
            directory.mkdir()
        dist.barrier()
        # Its writer starts processes, which a daemon (every worker of the pool) may not do.
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
        dist_checkpointing.save(plain_model_state(session), str(directory))
        # Its writer also keeps a process with a queue, which would outlive the pool's worker.
        filesystem_async._results_queue._manager.shutdown()
        filesystem_async._results_queue = None
        session.save()


@pytest.mark.parametrize(("model", "parallel", "processes"), [(DENSE, VPP, 2), (MOE, ALL, 8)], ids=["dense", "MoE"])
def test_megatron_core_loads_our_checkpoints(
    model: ModelConfig, parallel: ParallelConfig, processes: int, pool: GlooPool, tmp_path: Path
) -> None:
    pool.run(1, train_and_save, Part(model, tmp_path / "run", ALONE), 1)
    part = started_otherwise(Part(model, tmp_path / "none", parallel))
    assert all(pool.run(processes, load_with_megatron_core, part, require_checkpoint(tmp_path / "run")))


@pytest.mark.parametrize(("model", "parallel", "processes"), [(DENSE, VPP, 2), (MOE, ETP2, 4)], ids=["dense", "MoE"])
def test_we_read_checkpoints_of_megatron_core(
    model: ModelConfig, parallel: ParallelConfig, processes: int, pool: GlooPool, tmp_path: Path
) -> None:
    pool.run(processes, save_with_megatron_core, Part(model, tmp_path / "ours", parallel), tmp_path / "theirs")
    ours, theirs = MegatronSource(tmp_path / "ours"), MegatronSource(tmp_path / "theirs")
    assert ours.specs == theirs.specs
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in ours.specs)
