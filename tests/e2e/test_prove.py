"""tools/prove.py: a user's layout is proven on this machine, and a layout that differs would be seen."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config import load_run
from megatron_ext.proving.parity import Trajectory
from megatron_ext.proving.prove import TOLERANCE, Proof, plan_proof, prove
from tests.support.commands import TOOLS, command, new_process
from tests.support.workspace import ROOT, run_mapping, write_run

EXAMPLE = ROOT / "examples" / "quickstart" / "moe.yaml"


def test_the_quickstart_layout_is_proven() -> None:
    process = new_process(TOOLS / "prove.py", EXAMPLE, "--world-size", "8", "--processes", "8")
    assert process.returncode == 0, process.stderr
    assert "training 5 steps on 8 processes" in process.stdout
    assert "verdict: this layout trains what one process trains" in process.stdout
    print(process.stdout)


@pytest.mark.parametrize(
    "task", [{"kind": "sft", "weighting": "sample"}, {"kind": "preference", "beta": 0.5}], ids=["SFT", "DPO"]
)
def test_post_training_of_adapters_is_proven_without_their_dropout(task: dict[str, Any], tmp_path: Path) -> None:
    mapping = run_mapping(tmp_path, moe=True)
    mapping["task"] = task
    mapping["adapters"] = {"targets": [{"match": ["layers.*"], "rank": 4, "dropout": 0.1}], "lr_ratio": 16.0}
    mapping["checkpoint"]["initialize_from"] = "base"
    mapping["parallel"] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    mapping["parallel"] |= {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    del mapping["data"]["cache_dir"]
    plan = plan_proof(load_run(write_run(tmp_path / "run.yaml", mapping)), 2, 2)
    assert "adapters.targets: dropout -> 0.0" in plan.changes
    assert plan.cell.adapters is not None
    assert (plan.cell.adapters.lr_ratio, plan.cell.adapters.targets[0].rank) == (16.0, 4)
    assert (plan.cell.task.kind, plan.cell.documents) == (task["kind"], True)
    proof = prove(plan)
    print(f"adapters of a MoE model, TP2 SP, {plan.cell.task.kind}: {proof.difference.worst:.1e}")
    assert proof.holds


def test_a_large_run_is_shrunk_to_this_machine_and_says_so(tmp_path: Path) -> None:
    mapping = run_mapping(tmp_path, moe=True)
    mapping["model"] |= {
        "num_layers": 48,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
    }
    mapping["model"] |= {
        "num_moe_experts": 64,
        "moe_ffn_hidden_size": 2048,
        "moe_router_topk": 6,
        "moe_first_k_dense": 1,
    }
    mapping["parallel"] = {
        "tensor_model_parallel_size": 4,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 8,
        "virtual_pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 8,
        "expert_tensor_parallel_size": 1,
    }
    mapping["train"] |= {"global_batch_size": 1024, "micro_batch_size": 1}
    plan = plan_proof(load_run(write_run(tmp_path / "run.yaml", mapping)), 256, 8)
    assert plan.processes <= 8
    assert plan.changes[0].startswith("processes: 256 -> 8")
    assert any(change.startswith("parallel.pipeline_model_parallel_size: 8 ->") for change in plan.changes)
    assert "model.num_layers: 48 -> 12" in plan.changes
    small = plan.cell.model
    kept = (
        "num_moe_experts",
        "moe_router_topk",
        "num_attention_heads",
        "num_query_groups",
        "moe_gating_normalization",
    )
    assert small.moe_layer_pattern == [False] + [True] * 11
    large = load_run(tmp_path / "run.yaml").model
    assert all(getattr(small, name) == getattr(large, name) for name in kept)
    assert small.hidden_size < 128


@pytest.mark.parametrize(
    ("losses", "proven"),
    [
        (["seq_aux_loss", "global_aux_loss"], ["seq_aux_loss", "global_aux_loss"]),
        (["aux_loss", "global_aux_loss"], ["aux_loss"]),
    ],
)
def test_the_global_balance_loss_is_proven_where_one_process_can_see_it(
    losses: list[str], proven: list[str], tmp_path: Path
) -> None:
    mapping = run_mapping(tmp_path, moe=True)
    mapping["model"] |= {"moe_router_load_balancing_type": losses, "moe_aux_loss_coeff": [0.02, 0.03]}
    plan = plan_proof(load_run(write_run(tmp_path / "run.yaml", mapping)), 2, 8)
    assert list(plan.cell.model.balance_losses) == proven
    assert any("without global_aux_loss" in change for change in plan.changes) == (losses != proven)
    assert prove(plan).holds


@pytest.mark.parametrize(
    ("pattern", "thin"),
    [
        ([0] * 24 + [1] * 24, "000000111111"),
        ([0, 1] * 24, "010101010101"),
        ([0] + [1] * 47, "011111111111"),
        ([0] * 47 + [1], "000000000001"),
        ([1] * 48, "111111111111"),
    ],
)
def test_a_thinned_model_keeps_its_kinds_of_layers(pattern: list[int], thin: str, tmp_path: Path) -> None:
    mapping = run_mapping(tmp_path, moe=True)
    mapping["model"] |= {"num_layers": 48, "moe_layer_freq": pattern}
    plan = plan_proof(load_run(write_run(tmp_path / "run.yaml", mapping)), 2, 8)
    assert "".join(str(int(is_moe)) for is_moe in plan.cell.model.moe_layer_pattern) == thin
    assert f"model.moe_layer_freq: {thin} (1 is MoE, 0 is dense)" in plan.changes


def test_many_dense_layers_first_are_thinned_too(tmp_path: Path) -> None:
    mapping = run_mapping(tmp_path, moe=True)
    mapping["model"] |= {"num_layers": 48, "moe_first_k_dense": 12}
    plan = plan_proof(load_run(write_run(tmp_path / "run.yaml", mapping)), 2, 8)
    assert plan.cell.model.moe_layer_pattern == [False] * 3 + [True] * 9


@pytest.mark.parametrize(
    ("model", "parallel", "most", "left"),
    [
        ({"num_layers": 9}, {}, 4, 3),
        ({"num_layers": 61}, {}, 16, 61),
        ({"num_layers": 48}, {}, 16, 12),
        ({"num_layers": 24}, {"pipeline_model_parallel_size": 2}, 1, 2),
        (
            {"num_layers": 70},
            {
                "pipeline_model_parallel_size": 6,
                "virtual_pipeline_model_parallel_size": 2,
                "account_for_embedding_in_pipeline_split": True,
                "account_for_loss_in_pipeline_split": True,
            },
            16,
            22,
        ),
    ],
)
def test_layers_are_as_few_as_the_pipeline_lets_them_be(
    model: dict[str, int], parallel: dict[str, Any], most: int, left: int, tmp_path: Path
) -> None:
    mapping = run_mapping(tmp_path)
    mapping["model"] |= model
    mapping["parallel"] = parallel
    mapping["train"]["global_batch_size"] = 48
    plan = plan_proof(load_run(write_run(tmp_path / "run.yaml", mapping)), None, 16, most_layers=most)
    assert plan.cell.model.num_layers == left


def test_data_parallelism_is_lowered_before_other_degrees(tmp_path: Path) -> None:
    mapping = run_mapping(tmp_path)
    mapping["model"] |= {"num_attention_heads": 8, "num_query_groups": 8}
    mapping["parallel"] = {"tensor_model_parallel_size": 8}
    mapping["train"] |= {"global_batch_size": 12}
    plan = plan_proof(load_run(write_run(tmp_path / "run.yaml", mapping)), 24, 16)
    assert (plan.processes, plan.cell.parallel.tensor_model_parallel_size) == (16, 8)


def test_context_parallelism_and_documents_are_part_of_the_proof(tmp_path: Path) -> None:
    mapping = run_mapping(tmp_path, moe=True)
    mapping["data"] |= {"reset_attention_mask": True}
    mapping["parallel"] = {"context_parallel_size": 8, "expert_model_parallel_size": 2}
    run = load_run(write_run(tmp_path / "run.yaml", mapping))
    plan = plan_proof(run, 16, 4)
    assert plan.processes == 4
    assert "parallel.context_parallel_size: 8 -> 4" in plan.changes
    assert plan.cell.documents
    proof = prove(plan_proof(run, 16, 2))
    assert proof.plan.cell.parallel.context_parallel_size == 2
    print(f"CP2 EP2 with documents: {proof.difference.worst:.1e}")
    assert proof.holds


def test_the_steps_of_every_stage_are_proven(tmp_path: Path) -> None:
    mapping = run_mapping(tmp_path, moe=True)
    stage = {"mix": {"ja": 1.0}, "steps": 100}
    mapping["data"] = {"sequence_length": 64, "tokenizer": "t", "sources": {"ja": {"path": "ja"}}} | {
        "stages": [
            {"name": "short", **stage},
            {"name": "long", **stage, "sequence_length": 128, "global_batch_size": 4, "rotary_base": 50000.0},
            {"name": "again", **stage},
        ]
    }
    mapping["train"] = {"global_batch_size": 8, "micro_batch_size": 2}
    mapping["parallel"] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    path = write_run(tmp_path / "run.yaml", mapping)
    process = new_process(TOOLS / "prove.py", path, "--world-size", "2", "--processes", "2")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "training 6 steps on 2 processes" in process.stdout
    assert "steps 1 to 3 as in short: 8 x 64, rotary base 10000" in process.stdout
    assert "steps 4 to 6 as in long: 4 x 128, rotary base 50000" in process.stdout
    assert "verdict: this layout trains what one process trains" in process.stdout
    first, second = plan_proof(load_run(path), 2, 2).cell.shapes
    assert second.length == 2 * first.length
    assert first.samples == 2 * second.samples


def test_a_models_features_survive_the_shrinking(tmp_path: Path) -> None:
    mapping = run_mapping(tmp_path, moe=True)
    mapping["model"] |= {
        "num_query_groups": None,
        "multi_latent_attention": {
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_head_dim": 128,
            "qk_pos_emb_head_dim": 64,
            "v_head_dim": 128,
        },
        "rope_scaling": {"kind": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0},
        "hidden_dropout": 0.1,
    }
    plan = plan_proof(load_run(write_run(tmp_path / "run.yaml", mapping)), 2, 2)
    small = plan.cell.model
    assert small.multi_latent_attention is not None
    assert small.multi_latent_attention.q_lora_rank == 40
    assert small.rope_scaling == load_run(tmp_path / "run.yaml").model.rope_scaling
    assert "model.hidden_dropout: 0.1 -> 0.0" in plan.changes

    mapping = run_mapping(tmp_path, moe=True)
    mapping["model"] |= {"rotary_percent": 0.25, "qk_layernorm": "projection", "add_bias_linear": True}
    mapping["model"] |= {"gated_linear_unit": False, "activation_func": "gelu"}
    mapping["model"] |= {"num_layers": 48, "sliding_window": 8, "window_attn_skip_freq": 4, "attention_sinks": True}
    cell = plan_proof(load_run(write_run(tmp_path / "run.yaml", mapping)), 2, 2).cell
    small = cell.model
    assert (small.rotary_width, small.qk_layernorm, small.add_bias_linear) == (4, "projection", True)
    assert (small.sliding_window, small.attention_sinks) == (cell.length // 4 + 1, True)
    assert set(small.window_layer_pattern) == {True, False}


def test_a_layout_that_differs_is_not_proven() -> None:
    plan = plan_proof(load_run(EXAMPLE), 8, 8)
    single = Trajectory((5.0, 4.0), (1.0, 1.0))
    assert Proof(plan, single, single).holds
    assert Proof(plan, Trajectory((5.0, 4.0 + TOLERANCE), (1.0, 1.0)), single).holds
    assert not Proof(plan, Trajectory((5.0, 4.0), (1.0, 1.0 + 2 * TOLERANCE)), single).holds
    assert not Proof(plan, replace(single, losses=(5.0, float("nan"))), single).holds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size", "6"], "6 processes cannot be split"),
        (["parallel.expert_model_parallel_size=1"], "parallel.expert_tensor_parallel_size = 1"),
    ],
)
def test_a_layout_that_cannot_be_is_an_error(arguments: list[str], message: str) -> None:
    process = command(TOOLS / "prove.py", EXAMPLE, *arguments)
    assert process.returncode == 2
    assert any(line.startswith("error: ") for line in process.stderr.splitlines())
    assert message in process.stderr
