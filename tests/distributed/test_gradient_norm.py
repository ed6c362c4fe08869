"""The gradient's norm, which waits for the device once, against megatron-core's, which waits once a parameter."""

import pytest
import torch

from megatron_ext.config import AdamConfig, Bf16Precision, ParallelConfig, RecomputeConfig, RuntimeConfig
from megatron_ext.mcore.initialization import initialize_weights
from megatron_ext.mcore.model import build_chunks, wrap_chunks
from megatron_ext.mcore.optimizer import build_optimizer, gradient_norm
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model


def norms(parallel: ParallelConfig) -> tuple[float, float]:
    """Ours and megatron-core's, of gradients drawn by each rank (replicas included: they are not reduced here)."""
    split_process_group(parallel, RuntimeConfig(device="cpu"))
    seed_everything(0)
    model, precision = tiny_model(moe=True), Bf16Precision(kind="bf16")
    config = transformer_config(model, parallel, precision, RecomputeConfig())
    chunks = build_chunks(model, parallel, config, torch.device("cpu"))
    initialize_weights(model, list(chunks), seed=0)
    wrapped = wrap_chunks(chunks, config, parallel)
    optimizer = build_optimizer(AdamConfig(kind="adam", lr=1e-3), parallel, precision, wrapped)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for chunk in wrapped:
        for parameter in chunk.parameters():
            parameter.main_grad.normal_(generator=generator)
    return gradient_norm(optimizer), float(optimizer.get_grad_norm())


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
