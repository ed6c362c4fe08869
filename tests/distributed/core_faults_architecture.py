"""Shows the faults of megatron-core that concern parts of architectures; `core_faults.py` collects them."""

from typing import Any
from unittest import mock

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, reduce_from_tensor_model_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.config import (
    Fp32Precision,
    ModelConfig,
    MultiLatentAttention,
    ParallelConfig,
    RecomputeConfig,
    RuntimeConfig,
)
from megatron_ext.mcore import layer_specs
from megatron_ext.mcore.backends.torch import TorchLayers
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.proving.parity import Cell, Trajectory, compare, run_cell, run_layout
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.pool import GlooPool, WorkerFailure
from megatron_ext.testing.tiny import tiny_model

TP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
LATENT = MultiLatentAttention(kv_lora_rank=24, qk_head_dim=16, qk_pos_emb_head_dim=8, v_head_dim=12)
LATENT_MODEL = tiny_model(num_query_groups=None, multi_latent_attention=LATENT, num_layers=2, init_method_std=0.2)
# Real faults are orders of magnitude larger than this, rounding orders of magnitude smaller.
CLEAR = 1e-4


def config_of(model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    split_process_group(parallel, RuntimeConfig(device="cpu"))
    seed_everything(0)
    return transformer_config(model, parallel, Fp32Precision(kind="fp32"), RecomputeConfig())


def strided_sum() -> list[float]:
    config_of(tiny_model(), ParallelConfig(tensor_model_parallel_size=2))
    return reduce_from_tensor_model_parallel_region(torch.ones(2, 3).t()).flatten().tolist()


def sums_of_strided_tensors(pool: GlooPool) -> bool:
    return any(2.0 not in values for values in pool.run(2, strided_sum))


def core_latent_attention_fails() -> bool:
    config = config_of(LATENT_MODEL, ParallelConfig())
    config.qk_layernorm = True
    submodules = layer_specs._latent_attention(TorchLayers(), LATENT_MODEL).submodules
    submodules.linear_q_down_proj = submodules.linear_kv_down_proj = ColumnParallelLinear
    submodules.q_layernorm = None  # queries are projected directly
    try:
        MLASelfAttention(config, submodules, 1, AttnMaskType.causal, pg_collection=get_default_pg_collection())
    except (TypeError, RuntimeError):
        return True
    return False


def latent_attention_needs_transformer_engine(pool: GlooPool) -> bool:
    return pool.run(1, core_latent_attention_fails)[0]


def split_projection(config: TransformerConfig, outputs: int, shared: int, tp_group: Any) -> ColumnParallelLinear:
    """The down-projection as megatron-core builds it without Transformer Engine."""
    return ColumnParallelLinear(
        config.hidden_size,
        outputs,
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        tp_group=tp_group,
    )


def train_with_split_projection(cell: Cell) -> Trajectory:
    with mock.patch.object(layer_specs, "DownProjection", split_projection):
        return run_cell(cell)


def latent_key_gradient_of_one_rank(pool: GlooPool) -> bool:
    reference = run_layout(pool, Cell(LATENT_MODEL, ParallelConfig(), steps=2), 1)
    faulty = pool.run(2, train_with_split_projection, Cell(LATENT_MODEL, TP2, steps=2))[0]
    return compare(faulty, reference).norm > CLEAR


def core_shared_experts_refuse() -> bool:
    model = tiny_model(moe=True, add_bias_linear=True)
    config = config_of(model, ParallelConfig())
    linears = layer_specs._linears(TorchLayers())
    try:
        SharedExpertMLP(config, linears, gate=False, pg_collection=get_default_pg_collection())
    except AssertionError as error:
        return "bias is not supported" in str(error)
    return False


def shared_experts_refuse_biases(pool: GlooPool) -> bool:
    return pool.run(1, core_shared_experts_refuse)[0]


def experts_refuse_biases_under_etp(pool: GlooPool) -> bool:
    fields: dict[str, Any] = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 4, "num_moe_experts": 4}
    parallel = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
    try:
        TransformerConfig(**fields, **parallel, sequence_parallel=True, add_bias_linear=True)
    except AssertionError as error:
        return "ETP==1" in str(error)
    return False


def recomputed_bias_never_ends(pool: GlooPool) -> bool:
    recompute = RecomputeConfig(granularity="selective", modules=["mlp"])
    cell = Cell(tiny_model(add_bias_linear=True, num_layers=1), ParallelConfig(), recompute=recompute, steps=1)
    try:
        pool.run(1, train_with_core_mlp, cell, timeout=20.0)
    except WorkerFailure as failure:
        return "no answer" in str(failure)
    return False


def train_with_core_mlp(cell: Cell) -> Trajectory:
    with mock.patch.object(TorchLayers, "feed_forward", return_value=MLP):
        return run_cell(cell)


ARCHITECTURE_FAULTS = (
    recomputed_bias_never_ends,
    sums_of_strided_tensors,
    latent_attention_needs_transformer_engine,
    latent_key_gradient_of_one_rank,
    shared_experts_refuse_biases,
    experts_refuse_biases_under_etp,
)
