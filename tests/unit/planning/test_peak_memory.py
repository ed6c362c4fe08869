"""The memory of a step against counted tensors of real ones, and against peaks that a GPU's allocator reported."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_ext.config import Bf16Precision, MultiLatentAttention, ParallelConfig, RecomputeConfig, RunConfig
from megatron_ext.planning.peak_memory import peak_memory
from megatron_ext.testing.live_memory import MeasuredMemory, measure_step
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from megatron_ext.testing.triton_interpreter import mend_interpreter, why_not_interpreting
from tests.unit.planning.known_models import LLAMA_LAYERS, MEASURED_GIB, run_of


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
LATENT: dict[str, Any] = {
    "num_query_groups": None,
    # Values as wide as keys: elsewhere the attention of a CPU, and of that alone, has whole S x S matrices.
    "multi_latent_attention": MultiLatentAttention(
        kv_lora_rank=24, q_lora_rank=40, qk_head_dim=16, qk_pos_emb_head_dim=16, v_head_dim=32
    ),
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
    "latent MoE fp32, all but routed experts again": (
        1,
        tiny_model(moe=True, **(WIDE | LATENT), moe_shared_expert_intermediate_size=384),
        {},
        "fp32",
        RecomputeConfig(granularity="selective", modules=["core_attn", "shared_experts", "mlp", "layernorm"]),
    ),
    "MoE bf16, MoE layers again": (
        1,
        tiny_model(moe=True, **WIDE, vocab_size=2048, moe_first_k_dense=3),
        {},
        "bf16",
        RecomputeConfig(granularity="selective", modules=["moe"]),
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


def measure_interpreted_step(run: RunConfig) -> MeasuredMemory:
    mend_interpreter()
    return measure_step(run)


def test_peak_with_our_own_kernels_is_what_training_needs(pool: GlooPool) -> None:
    if (missing := why_not_interpreting()) is not None:
        pytest.skip(missing)
    model = tiny_model(num_layers=2, **WIDE)
    run = run_of(model, ParallelConfig(), samples=2, rows=2, length=128, precision=Bf16Precision(kind="bf16"))
    run = replace(run, runtime=replace(run.runtime, kernels="triton"))
    (measured,) = pool.run(1, measure_interpreted_step, run)
    estimated = peak_memory(run, run.resolve(1), on_cpu=True)
    share = estimated.activations / (measured.peak - measured.state)
    print(f"estimated {estimated.total / 2**20:.2f} MiB, counted {measured.peak / 2**20:.2f}, no state {share:.3f}")
    assert estimated.total == pytest.approx(measured.peak, rel=0.10)
    assert share == pytest.approx(1, rel=0.10)


def test_activations_in_the_hosts_memory_are_counted_there(pool: GlooPool) -> None:
    """Six of eight layers move all that they keep: on the device two layers' are left, beside the last two's."""
    kept = run_of(tiny_model(num_layers=8, **WIDE), ParallelConfig(), samples=4, rows=2, length=256)
    moved = replace(kept, recompute=RecomputeConfig(offload_layers=6, offload_min_bytes=1))
    (all_here,), (some_there,) = (pool.run(1, measure_step, run) for run in (kept, moved))
    plans = [peak_memory(run, run.resolve(1), on_cpu=True) for run in (kept, moved)]
    figures = (
        ("device", plans[1].total, some_there.peak),
        ("host", plans[1].on_host, some_there.on_host),
        ("saved on the device", plans[0].total - plans[1].total, all_here.peak - some_there.peak),
    )
    for name, estimated, counted in figures:
        print(f"{name}: estimated {estimated / 2**20:.2f} MiB, counted {counted / 2**20:.2f}")
        assert estimated == pytest.approx(counted, rel=0.10), name
    assert all_here.on_host == plans[0].on_host == 0


def test_what_the_host_keeps_of_moments_is_counted() -> None:
    model, parallel = LLAMA_LAYERS, ParallelConfig()
    run = run_of(model, parallel, samples=8, rows=1, length=4096, precision=Bf16Precision(kind="bf16"))
    on_host = replace(run, optimizer=replace(run.optimizer, moments_on_host=True, exp_avg_dtype="bf16"))
    here, there = (peak_memory(one, one.resolve(4)) for one in (run, on_host))
    parameters = here.state / (2 + 4 + (4 + 8) / 4)  # a quarter of optimizer and master weights
    assert there.on_host == pytest.approx(parameters * (2 + 4) / 4)
    assert here.state - there.state == pytest.approx(parameters * 8 / 4)


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
