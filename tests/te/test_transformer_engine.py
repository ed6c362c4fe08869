"""The real Transformer Engine model, built on CPU: what it saves and loads, and what FP8 recipes become."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint.find import find_checkpoint
from megatron_ext.config import (
    Bf16Precision,
    Fp8Precision,
    ModelConfig,
    MultiLatentAttention,
    ParallelConfig,
    Precision,
    load_run,
    read_yaml,
)
from megatron_ext.proving.parity import Cell
from megatron_ext.proving.prove import plan_proof
from megatron_ext.runtime import core_guard
from megatron_ext.runtime.accelerators import fuses_weight_gradients
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from megatron_ext.testing.transformer_engine import why_not_importable
from tests.support.workspace import ROOT
from tests.te import builds, te_faults

pytestmark = pytest.mark.te

RUNS = [path for path in sorted(ROOT.glob("examples/*/*.yaml")) if "model" in read_yaml(path)]
BF16 = Bf16Precision(kind="bf16")
# Widths that FP8 takes: multiples of 16 on each of two TP ranks.
MOE = tiny_model(moe=True, moe_ffn_hidden_size=32, moe_shared_expert_intermediate_size=32)
DENSE = tiny_model()


def layout(tp: int = 1, ep: int = 1, etp: int | None = None, pp: int = 1) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        pipeline_model_parallel_size=pp,
    )


LAYOUTS = {
    "one": (1, layout()),
    "EP2": (2, layout(ep=2)),
    "TP2-EP2-ETP1": (2, layout(tp=2, ep=2, etp=1)),
    "TP2-ETP2": (2, layout(tp=2)),
    "PP2": (2, layout(pp=2)),
}


def fp8(**fields: Any) -> Fp8Precision:
    return Fp8Precision(kind="fp8", **fields)


@pytest.fixture(scope="module")
def te_pool() -> Iterator[GlooPool]:
    """Two processes with Transformer Engine."""
    if (reason := why_not_importable()) is not None:
        pytest.skip(reason)
    with GlooPool(2, transformer_engine=True) as processes:
        yield processes


def shrunk(path: Path) -> tuple[int, Cell]:
    """An example run with small widths on at most two processes."""
    plan = plan_proof(load_run(path, []), None, limit=2)
    return plan.processes, replace(plan.cell, precision=BF16)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_checkpoints_of_every_example_are_the_torch_backends(path: Path, te_pool: GlooPool) -> None:
    processes, cell = shrunk(path)
    ours = te_pool.run(processes, builds.places, cell, "torch")
    theirs = te_pool.run(processes, builds.places, cell, "transformer_engine")
    assert sum(map(len, ours)) > 0
    assert theirs == ours


LATENT = MultiLatentAttention(q_lora_rank=16, kv_lora_rank=16, qk_head_dim=8, qk_pos_emb_head_dim=8, v_head_dim=12)
FEATURES: dict[str, dict[str, Any]] = {
    "biases": {"add_bias_linear": True},
    "MoE with biases": {"moe": True, "add_bias_linear": True},
    "QKV biases": {"add_qkv_bias": True},
    "LayerNorm": {"normalization": "LayerNorm"},
    "GELU": {"gated_linear_unit": False, "activation_func": "gelu"},
    "MoE with GELU": {"moe": True, "gated_linear_unit": False, "activation_func": "gelu"},
    "QK norm per head": {"qk_layernorm": "head"},
    "QK norm over the projection": {"qk_layernorm": "projection"},
    "learned positions": {"position_embedding_type": "learned_absolute"},
    "tied embeddings": {"untie_embeddings_and_output_weights": False},
    "gated shared experts": {"moe": True, "moe_shared_expert_gate": True},
    "latent attention": {"num_query_groups": None, "multi_latent_attention": LATENT},
    "latent attention, queries direct": {
        "moe": True,
        "num_query_groups": None,
        "multi_latent_attention": replace(LATENT, q_lora_rank=None),
    },
    "expert bias": {"moe": True, "moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"},
}


@pytest.mark.parametrize("name", FEATURES)
def test_checkpoints_with_each_feature_are_the_torch_backends(name: str, te_pool: GlooPool) -> None:
    cell = Cell(tiny_model(**FEATURES[name]), ParallelConfig(), BF16)
    assert te_pool.run(1, builds.places, cell, "transformer_engine") == te_pool.run(1, builds.places, cell, "torch")


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "MoE"])
@pytest.mark.parametrize(
    ("source", "target"), [("torch", "transformer_engine"), ("transformer_engine", "torch")], ids=["to-TE", "from-TE"]
)
def test_weights_load_into_the_other_backend_bit_for_bit(
    name: str, model: ModelConfig, source: str, target: str, te_pool: GlooPool, tmp_path: Path
) -> None:
    processes, parallel = LAYOUTS[name]
    if not model.is_moe:
        parallel = replace(parallel, expert_model_parallel_size=1, expert_tensor_parallel_size=None)
    cell = Cell(model, parallel, BF16)
    for shards, different in te_pool.run(processes, builds.save_then_load, cell, source, target, tmp_path):
        assert shards > 0
        assert not different


@pytest.mark.parametrize("name", ["one", "EP2", "TP2-EP2-ETP1", "TP2-ETP2"])
def test_experts_are_marked_as_ours_in_every_layout(name: str, te_pool: GlooPool) -> None:
    processes, parallel = LAYOUTS[name]
    marks = te_pool.run(processes, builds.expert_marks, Cell(MOE, parallel, BF16))[0]
    assert {(linear, split) for linear, _, _, split in marks} == {("linear_fc1", 0), ("linear_fc2", 1)}
    assert all(allreduce is False and is_split is True for _, allreduce, is_split, _ in marks)


RECIPES: dict[str, tuple[Precision, dict[str, Any], str, dict[str, Any]]] = {
    "tensorwise": (
        fp8(recipe="tensorwise", num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=2),
        {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 2},
        "Float8CurrentScaling",
        {"format": "HYBRID"},
    ),
    "delayed": (
        fp8(recipe="delayed", amax_history_len=16, amax_compute_algo="most_recent", margin=1),
        {"fp8_amax_history_len": 16, "fp8_amax_compute_algo": "most_recent", "fp8_margin": 1},
        "DelayedScaling",
        {"margin": 1, "amax_history_len": 16, "amax_compute_algo": "most_recent", "format": "HYBRID"},
    ),
    "blockwise": (fp8(recipe="blockwise", format="e4m3"), {"fp8": "e4m3"}, "Float8BlockScaling", {"format": "E4M3"}),
    "mxfp8": (
        fp8(recipe="mxfp8", format="e4m3"),
        {"fp8": "e4m3"},
        "MXFP8BlockScaling",
        {"format": "E4M3", "margin": 0},
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_recipe_becomes_transformer_engines(recipe: str, te_pool: GlooPool) -> None:
    precision, expected, cls, recipe_fields = RECIPES[recipe]
    fields, name, built = te_pool.run(1, builds.translated, Cell(MOE, ParallelConfig(), precision))[0]
    common = {
        "transformer_impl": "transformer_engine",
        "bf16": True,
        "fp8": "hybrid",
        "fp8_recipe": recipe,
        "fp8_param": False,
        "moe_router_padding_for_quantization": True,
    }
    assert fields | common | expected == fields
    assert (name, built) == (cls, recipe_fields)


DELAYED = fp8(recipe="delayed", amax_history_len=8)


@pytest.mark.parametrize("saved_in", ["one", "EP2", "PP2"])
@pytest.mark.parametrize("loaded_in", ["one", "EP2", "TP2-EP2-ETP1", "PP2"])
def test_delayed_scaling_survives_a_checkpoint_in_any_layout(
    saved_in: str, loaded_in: str, te_pool: GlooPool, tmp_path: Path
) -> None:
    processes, parallel = LAYOUTS[saved_in]
    keys = te_pool.run(processes, builds.save_scaling, Cell(MOE, parallel, DELAYED), tmp_path)
    assert any(".mlp.experts.experts.linear_fc1._extra_state.amax_history_fwd" in key for key in keys[0])
    processes, parallel = LAYOUTS[loaded_in]
    cell, checkpoint = Cell(MOE, parallel, DELAYED), find_checkpoint(tmp_path)
    for as_saved, as_new, other in te_pool.run(processes, builds.load_scaling, cell, checkpoint):
        assert as_saved > 0
        assert (as_new, other) == (0, 0)


def test_delayed_scaling_is_of_no_concern_to_the_torch_backend(te_pool: GlooPool, tmp_path: Path) -> None:
    te_pool.run(1, builds.save_scaling, Cell(MOE, ParallelConfig(), DELAYED), tmp_path)
    te_pool.run(1, builds.load_into_torch, Cell(MOE, ParallelConfig(), BF16), find_checkpoint(tmp_path))


@pytest.mark.parametrize("saved", [BF16, fp8(recipe="delayed", amax_history_len=4)], ids=["bf16", "shorter history"])
def test_delayed_scaling_starts_afresh_where_the_checkpoint_has_none(
    saved: Precision, te_pool: GlooPool, tmp_path: Path
) -> None:
    te_pool.run(1, builds.save_scaling, Cell(MOE, ParallelConfig(), saved), tmp_path)
    cell = Cell(MOE, ParallelConfig(), DELAYED)
    as_saved, as_new, other = te_pool.run(1, builds.load_scaling, cell, find_checkpoint(tmp_path))[0]
    assert as_new > 0
    assert other == 0
    # Scales are remembered one by one, whatever the length of the history.
    assert (as_saved == 0) == (saved is BF16)


def test_every_fault_that_needs_transformer_engine_is_shown() -> None:
    assert set(te_faults.SHOWN) == {fault.name for fault in core_guard.FAULTS if fault.needs == "Transformer Engine"}


@pytest.mark.parametrize("name", te_faults.SHOWN)
def test_fault_is_there_in_the_versions_listed(name: str, te_pool: GlooPool) -> None:
    (fault,) = (fault for fault in core_guard.FAULTS if fault.name == name)
    assert te_faults.SHOWN[name](te_pool) == fault.present_in(core_guard.installed_version())


def test_weight_gradients_are_fused_and_the_output_layer_needs_apex(te_pool: GlooPool) -> None:
    cell = Cell(MOE, ParallelConfig(), BF16)
    assert te_pool.run(1, builds.fused_gradients, cell) == [({True}, fuses_weight_gradients())]
