"""Whole models trained with our kernels, through Triton's interpreter, beside the same models without them."""

from dataclasses import replace

import pytest

from megatron_ext.config import (
    Fp8Precision,
    Fp32Precision,
    ModelConfig,
    MultiLatentAttention,
    ParallelConfig,
    Precision,
    RecomputeConfig,
    YarnRopeScaling,
)
from megatron_ext.proving.parity import Cell, Trajectory, compare, run_cell
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from megatron_ext.testing.triton_interpreter import mend_interpreter, why_not_interpreting

SMALL = {"samples": 2, "micro_batch": 1, "length": 16, "steps": 2}
LATENT = MultiLatentAttention(kv_lora_rank=24, q_lora_rank=40, qk_head_dim=8, qk_pos_emb_head_dim=8, v_head_dim=12)
DROPS = tiny_model(
    moe=True,
    num_layers=2,
    moe_expert_capacity_factor=1.0,
    moe_pad_expert_input_to_capacity=True,
    multi_latent_attention=LATENT,
    num_query_groups=None,
)
OTHER_PARTS = tiny_model(
    moe=True,
    num_layers=2,
    normalization="LayerNorm",
    qk_layernorm="projection",
    rotary_percent=0.5,
    rope_scaling=YarnRopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32),
)
# fp32: exponentials and sums differ by a few units in the last place, two steps apart. bf16, which fp8 is computed
# beside: SwiGLU is rounded once in place of three times, and the casts, the same bit for bit, are fed that.
ALONE = ParallelConfig()
# Every rank has all experts, so that our own kernels and no messages bring tokens to them.
SPLIT = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=1)
AGAIN = RecomputeConfig(granularity="full", logits=True)
CASES: list[tuple[ModelConfig, ParallelConfig, Precision, RecomputeConfig, float]] = [
    (DROPS, SPLIT, Fp32Precision(kind="fp32"), RecomputeConfig(), 2e-6),
    (OTHER_PARTS, ALONE, Fp8Precision(kind="fp8", recipe="delayed"), AGAIN, 2e-2),
]
SWIGLU, SUMS, LOSS = {"swiglu._forward", "swiglu._backward"}, {"gather_sum._sum"}, {"cross_entropy._log_sum"}
LOSS |= {"cross_entropy._gradient"}
ROTATION, NORM = {"rotary._rotate"}, {"sum_norm._forward", "sum_norm._backward"}
CASTS, GRADIENTS = {"fp8_cast._cast"}, {"grouped_gradient._add"}


def train(cell: Cell) -> tuple[Trajectory, set[str]]:
    """The losses and gradient norms of `cell`, and the kernels that ran."""
    from triton.runtime.interpreter import GridExecutor

    mend_interpreter()
    ran: set[str] = set()
    call = GridExecutor.__call__

    def noting(self: GridExecutor, *args: object, **options: object) -> None:
        ran.add(f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}")
        call(self, *args, **options)

    GridExecutor.__call__ = noting
    try:
        return run_cell(cell), ran
    finally:
        GridExecutor.__call__ = call


@pytest.mark.parametrize(("model", "parallel", "precision", "recompute", "tolerance"), CASES, ids=["fp32", "fp8"])
def test_training_with_our_kernels_is_training(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    recompute: RecomputeConfig,
    tolerance: float,
    pool: GlooPool,
) -> None:
    if (missing := why_not_interpreting()) is not None:
        pytest.skip(missing)
    cell = Cell(model, parallel, precision, recompute, **SMALL)
    cells = [replace(cell, kernels="torch"), replace(cell, kernels="triton")]
    processes = parallel.tensor_model_parallel_size
    ((expected, none), *_), ((measured, ran), *_) = (pool.run(processes, train, cell) for cell in cells)
    difference = compare(measured, expected).worst
    print(f"{precision.kind}: {difference:.1e}, {sorted(ran)}")
    assert difference < tolerance
    assert not none
    assert ran == SWIGLU | SUMS | LOSS | ROTATION | NORM | (CASTS if precision.kind == "fp8" else GRADIENTS)
