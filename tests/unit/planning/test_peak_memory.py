"""The memory of a step against counted tensors of real ones, and against peaks that a GPU's allocator reported."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_ext.config import Bf16Precision, ModelConfig, ParallelConfig, RecomputeConfig, RunConfig, TrainConfig
from megatron_ext.planning.peak_memory import peak_memory
from megatron_ext.testing.live_memory import measure_step
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from tests.support.minimal_run import load, mapping

LLAMA_LAYERS = ModelConfig(
    num_layers=8,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=32768,
)
MEASURED_GIB = {
    # benchmarks/RESULTS.md, "One GPU": torch, bf16, one H100, micro-batches of 2 x 4096.
    "dense": (LLAMA_LAYERS, 44.6),
    "8x8B": (replace(LLAMA_LAYERS, num_layers=1, num_moe_experts=8), 33.5),
    "64 experts": (
        replace(
            LLAMA_LAYERS,
            num_layers=4,
            hidden_size=2048,
            num_attention_heads=16,
            num_query_groups=16,
            num_moe_experts=64,
            moe_router_topk=6,
            moe_ffn_hidden_size=1408,
            moe_shared_expert_intermediate_size=2816,
        ),
        47.4,
    ),
}


def run_of(
    model: ModelConfig, parallel: ParallelConfig, *, samples: int, rows: int, length: int, **sections: Any
) -> RunConfig:
    run = load(mapping(runtime={"device": "cpu", "threads": 1}))
    train = TrainConfig(train_iters=2, global_batch_size=samples, micro_batch_size=rows)
    data = replace(run.data, sequence_length=length)
    return replace(run, model=model, parallel=parallel, train=train, data=data, **sections)


@pytest.mark.parametrize("name", MEASURED_GIB)
def test_peak_is_what_a_gpu_reported(name: str) -> None:
    model, measured = MEASURED_GIB[name]
    parallel = ParallelConfig(use_distributed_optimizer=False)
    run = run_of(model, parallel, samples=8, rows=2, length=4096, precision=Bf16Precision(kind="bf16"))
    estimated = peak_memory(run, run.resolve(1)).total / 2**30
    print(f"estimated {estimated:.1f} GiB, measured {measured}")
    assert estimated == pytest.approx(measured, rel=0.02)


WIDE: dict[str, Any] = {"hidden_size": 128, "ffn_hidden_size": 384, "max_position_embeddings": 512}
GPT_OSS: dict[str, Any] = {
    "activation_func": "quick_gelu",
    "activation_func_clamp_value": 7.0,
    "glu_linear_offset": 1.0,
    "moe_ffn_hidden_size": 768,
    "moe_router_linear_bias": True,
}
CASES = {
    "dense bf16, windows and sinks, norms again": (
        1,
        tiny_model(**WIDE, sliding_window=100, window_attn_skip_freq=2, attention_sinks=True),
        {},
        "bf16",
        RecomputeConfig(granularity="selective", modules=["layernorm"]),
    ),
    "MoE fp32 with gpt-oss's gates, filled up to a capacity, whole layers again": (
        1,
        tiny_model(moe=True, **(WIDE | GPT_OSS), moe_expert_capacity_factor=1.5, moe_pad_expert_input_to_capacity=True),
        {},
        "fp32",
        RecomputeConfig(granularity="full"),
    ),
    "dense bf16, losses by parts": (
        1,
        tiny_model(
            num_layers=2, vocab_size=32768, max_position_embeddings=512, untie_embeddings_and_output_weights=False
        ),
        {},
        "bf16",
        RecomputeConfig(logits=True),
    ),
    "MoE bf16, TP2 SP EP2 PP2 VPP2": (
        4,
        tiny_model(moe=True, **WIDE),
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
        },
        "bf16",
        RecomputeConfig(),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_peak_is_what_training_needs(name: str, pool: GlooPool) -> None:
    processes, model, degrees, kind, recompute = CASES[name]
    run = run_of(model, ParallelConfig(**degrees), samples=8, rows=2, length=256, recompute=recompute)
    if kind == "bf16":
        moments = replace(run.optimizer, exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16")
        run = replace(run, precision=Bf16Precision(kind="bf16"), optimizer=moments)
    measured = max(rank.peak for rank in pool.run(processes, measure_step, run))
    estimated = peak_memory(run, run.resolve(processes), on_cpu=True)
    print(f"estimated {estimated.total / 2**20:.2f} MiB, counted {measured / 2**20:.2f}")
    assert estimated.total == pytest.approx(measured, rel=0.10)
    assert estimated.activations > 0.3 * estimated.total  # or the state alone would decide


def test_stages_hold_as_many_micro_batches_as_come_after_them() -> None:
    """1F1B: the first of four stages keeps four micro-batches, and interleaved a little more than those."""
    model = replace(LLAMA_LAYERS, num_layers=16)

    def in_flight(chunks: int | None, samples: int = 64) -> float:
        parallel = ParallelConfig(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=chunks)
        run = run_of(model, parallel, samples=samples, rows=1, length=4096)
        return peak_memory(run, run.resolve(4)).in_flight

    assert in_flight(None) == 4
    assert in_flight(None, samples=2) == 2
    # Narayanan et al. 2021: 1 + (p - 1) / (p v) times as many.
    assert in_flight(2) == pytest.approx(4 * (1 + 3 / 8), abs=0.5)


def test_what_saves_memory_saves_memory() -> None:
    model = replace(LLAMA_LAYERS, num_moe_experts=8)

    def kept(recompute: RecomputeConfig, **degrees: Any) -> float:
        run = run_of(model, ParallelConfig(**degrees), samples=64, rows=1, length=4096, recompute=recompute)
        return peak_memory(run, run.resolve(8)).kept

    nothing, full = RecomputeConfig(), RecomputeConfig(granularity="full")
    selective = RecomputeConfig(granularity="selective", modules=["moe"])
    assert kept(full) < kept(selective) < kept(nothing)
    split = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    assert kept(nothing, **split) < 0.6 * kept(nothing)
    assert kept(nothing, context_parallel_size=2) < 0.7 * kept(nothing)
