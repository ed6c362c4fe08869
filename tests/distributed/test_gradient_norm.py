"""The gradient's norm, which waits for the device once, against megatron-core's, which waits once a parameter."""

import pytest
import torch

from megatron_ext.config import Bf16Precision, ParallelConfig
from megatron_ext.mcore.optimizer import gradient_norm
from megatron_ext.proving.parity import Cell, build_cell
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model


def norms(parallel: ParallelConfig) -> tuple[float, float]:
    """Ours and megatron-core's, of gradients drawn by each rank (replicas included: they are not reduced here)."""
    trainable, _ = build_cell(Cell(tiny_model(moe=True), parallel, Bf16Precision(kind="bf16")))
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for chunk in trainable.chunks:
        for parameter in chunk.parameters():
            parameter.main_grad.normal_(generator=generator)
    return gradient_norm(trainable.optimizer), float(trainable.optimizer.get_grad_norm())


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(use_distributed_optimizer=False),
        ParallelConfig(expert_model_parallel_size=2),
        ParallelConfig(pipeline_model_parallel_size=2, use_distributed_optimizer=False),
    ],
    ids=["DP2", "EP2, distributed optimizer", "PP2"],
)
def test_equals_megatron_cores(parallel: ParallelConfig, pool: GlooPool) -> None:
    results = pool.run(2, norms, parallel)
    print(results)
    for ours, core in results:
        # The same sums in fp32, in another order where dense and expert gradients are reduced over one group.
        assert ours == pytest.approx(core, rel=1e-6)
