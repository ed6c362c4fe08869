"""Counts and formulas against published test vectors, and state memory against what training really allocates."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_ext.config import (
    AdamConfig,
    Bf16Precision,
    Fp32Precision,
    ModelConfig,
    ParallelConfig,
    Precision,
    RecomputeConfig,
    RuntimeConfig,
    TrainConfig,
)
from megatron_ext.config.layout import resolve_layout
from megatron_ext.planning.check import describe_run
from megatron_ext.planning.flops import training_flops_per_token
from megatron_ext.planning.memory import state_memory
from megatron_ext.planning.parameters import count_parameters
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from tests.unit.config.test_load import load, mapping

TANUKI_8X8B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=65024,
    num_moe_experts=8,
)


def test_parameters_of_tanuki_8x8b() -> None:
    counts = count_parameters(TANUKI_8X8B)
    assert counts.total == 46_973_325_312
    assert counts.active == 13_150_457_856


def test_parameters_of_tanuki_8b() -> None:
    dense = replace(TANUKI_8X8B, num_moe_experts=None, vocab_size=65040, make_vocab_size_divisible_by=16)
    assert count_parameters(dense).total == count_parameters(dense).active == 7_512_395_776


def test_vocabulary_padding_is_not_counted() -> None:
    padded = replace(TANUKI_8X8B, vocab_size=65000)
    assert count_parameters(padded).total == 46_973_325_312 - 24 * 2 * 4096


def test_training_flops_of_tanuki_8x8b() -> None:
    assert training_flops_per_token(TANUKI_8X8B, 4096) == pytest.approx(80.518e9, rel=1e-5)


def test_shared_and_dense_layers_are_counted() -> None:
    base = training_flops_per_token(TANUKI_8X8B, 4096)
    shared = training_flops_per_token(replace(TANUKI_8X8B, moe_shared_expert_intermediate_size=1000), 4096)
    assert shared - base == pytest.approx(6 * 3 * 4096 * 1000 * 32)
    one_dense = training_flops_per_token(replace(TANUKI_8X8B, moe_first_k_dense=1), 4096)
    assert base - one_dense == pytest.approx(6 * 3 * 4096 * 14336)


def allocated_bytes(model: ModelConfig, parallel: ParallelConfig, precision: Precision) -> int:
    """Bytes of weights, gradient buffers, master weights and moments that this rank holds."""
    import torch

    from megatron_ext.mcore.model import build_chunks, release_chunks, wrap_chunks
    from megatron_ext.mcore.optimizer import build_optimizer
    from megatron_ext.mcore.transformer_config import transformer_config
    from megatron_ext.runtime.process_groups import split_process_group
    from megatron_ext.runtime.seeds import seed_everything

    split_process_group(parallel, RuntimeConfig(device="cpu"))
    seed_everything(0)
    config = transformer_config(model, parallel, precision, RecomputeConfig())
    chunks = build_chunks(model, parallel, config, torch.device("cpu"))
    wrapped = wrap_chunks(chunks, config, parallel)
    optimizer = build_optimizer(AdamConfig(kind="adam", lr=1e-3), parallel, precision, wrapped)
    weights = sum(p.numel() * (p.element_size() + p.main_grad.element_size()) for c in chunks for p in c.parameters())
    states = 0
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                moments = part.optimizer.state[main]
                states += sum(t.numel() * t.element_size() for t in moments.values())
                states += main.numel() * 4 if precision.kind == "bf16" else 0
    release_chunks(wrapped)
    return weights + states


@pytest.mark.parametrize("precision", [Fp32Precision(kind="fp32"), Bf16Precision(kind="bf16")], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "degrees",
    [
        {},
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
        },
        {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
        {"use_distributed_optimizer": False, "expert_model_parallel_size": 2},
        {"context_parallel_size": 2, "expert_model_parallel_size": 2},
    ],
    ids=["dp4", "tp2 ep2", "pp2 ep2", "plain ep2", "cp2 ep2"],
)
def test_state_memory_is_what_training_allocates(precision: Precision, degrees: dict[str, Any], pool: GlooPool) -> None:
    model, parallel = tiny_model(moe=True), ParallelConfig(**degrees)
    run = load(mapping(train={"global_batch_size": 8}))
    run = replace(run, model=model, parallel=parallel, precision=precision, data=replace(run.data, sequence_length=32))
    layout = resolve_layout(parallel, TrainConfig(train_iters=1, global_batch_size=8), 4)
    measured = max(pool.run(4, allocated_bytes, model, parallel, precision))
    estimated = state_memory(run, layout).bytes
    print(f"estimated {estimated:,} bytes, allocated {measured:,}")
    # Shards of the distributed optimizer are cut by buffer, not by parameter, so ranks differ by some parameters.
    assert estimated == pytest.approx(measured, rel=0.02)


def test_check_prints_grid_and_counts_and_reloads() -> None:
    from megatron_ext.config.load import load_config
    from megatron_ext.config.root import RunConfig
    from megatron_ext.config.yaml_text import parse_yaml

    run = load(mapping(parallel={"tensor_model_parallel_size": 2}))
    text = describe_run(run, 4)
    assert "rank grid of 4 processes: TP 2 x CP 1 x DP 2 x PP 1" in text
    assert f"{count_parameters(run.model).total:,} in all" in text
    assert "(the fewest this layout needs" in describe_run(run, None)
    resolved = text.split("rank grid")[0]
    assert load_config(RunConfig, parse_yaml(resolved, source="t"), source="t") == run
