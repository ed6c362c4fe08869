"""Routers to test, and the layouts to test them in."""

from dataclasses import replace

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from torch import Tensor

from megatron_ext.config import (
    Bf16Precision,
    Fp32Precision,
    ModelConfig,
    ParallelConfig,
    RecomputeConfig,
    RuntimeConfig,
)
from megatron_ext.mcore.moe.router import Router
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything

LENGTH, SAMPLES, HIDDEN, EXPERTS = 16, 4, 64, 4
ALONE = ParallelConfig()
TP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
TP2_EP2 = replace(TP2, expert_model_parallel_size=2, expert_tensor_parallel_size=1)
PRECISIONS = {"fp32": Fp32Precision(kind="fp32"), "bf16": Bf16Precision(kind="bf16")}


def build_router(model: ModelConfig, parallel: ParallelConfig = ALONE, precision: str = "fp32") -> Router:
    """A router of layer 2 in training, with the same random weights everywhere."""
    split_process_group(parallel, RuntimeConfig(device="cpu"))
    seed_everything(0)
    config = transformer_config(model, parallel, PRECISIONS[precision], RecomputeConfig())
    router = Router(config=config, pg_collection=get_default_pg_collection(), model=model)
    router.set_layer_number(2)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in router.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return router.train()


def hidden_states() -> Tensor:
    """[S, samples, H]"""
    return torch.randn(LENGTH, SAMPLES, HIDDEN, generator=torch.Generator().manual_seed(3))


def my_part(hidden: Tensor, router: Router) -> Tensor:
    """This rank's tokens: its data-parallel rank's samples and its part of their sequences."""
    dp = parallel_state.get_data_parallel_group()
    samples = hidden.chunk(dp.size(), dim=1)[dp.rank()]
    return samples[router.grid.positions(LENGTH // router.grid.splits, torch.device("cpu"))]


LAYOUTS = {
    "one process": (1, ALONE),
    "TP2": (2, TP2),
    "DP2": (2, ALONE),
    "EP2": (2, replace(ALONE, expert_model_parallel_size=2)),
    "TP2 DP2 EP2": (4, TP2_EP2),
    "CP2": (2, replace(ALONE, context_parallel_size=2)),
    "TP2 CP2": (4, replace(TP2, context_parallel_size=2)),
}
