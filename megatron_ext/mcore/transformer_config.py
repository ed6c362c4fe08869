"""The one translation of our configuration into megatron-core's TransformerConfig."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.config import Fp8Precision, ModelConfig, ParallelConfig, Precision, RecomputeConfig
from megatron_ext.config.output import Backend
from megatron_ext.errors import ConfigError
from megatron_ext.mcore.overrides import check_overrides
from megatron_ext.runtime.accelerators import fuses_weight_gradients

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Dtype of weights and activations under each kind of precision."""


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    recompute: RecomputeConfig,
    backend: Backend = "torch",
) -> TransformerConfig:
    """Return megatron-core's configuration of the transformer, which also says what its layers are built from.

    Raises:
        ConfigError: an override would not do what it says, or megatron-core refuses the combination.
    """
    check_overrides(model)
    dtype = DTYPES[precision.kind]
    fields = {
        **_architecture(model),
        **_moe(model, parallel),
        **_parallelism(parallel),
        **_recompute(recompute),
        **(_transformer_engine(model, parallel, precision) if backend == "transformer_engine" else {}),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        **model.transformer_overrides,
    }
    try:
        return TransformerConfig(**fields)
    except (ValueError, AssertionError, TypeError, ImportError) as error:
        raise ConfigError(f"megatron-core refuses this model: {error}") from error


def _leave_as_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _architecture(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_dim,
        "layernorm_epsilon": model.layernorm_epsilon,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Weights are drawn by parameter name once the model stands (initialization.py), alike in every layout. Its
        # own initialisation must still run: it is what marks a parameter as split over the TP group.
        "init_method": _leave_as_is,
        "output_layer_init_method": _leave_as_is,
        "embedding_init_method": _leave_as_is,
        "transformer_impl": "local",
        # Fusions that need Apex or Transformer Engine, or compile at run time.
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
    }


def _transformer_engine(model: ModelConfig, parallel: ParallelConfig, precision: Precision) -> dict[str, Any]:
    """What differs with Transformer Engine: its layers, its fused kernels and its FP8."""
    return {
        "transformer_impl": "transformer_engine",
        # megatron-core has fused kernels of SwiGLU alone for routed experts.
        "bias_activation_fusion": model.gated_linear_unit and model.activation_func == "silu",
        "bias_dropout_fusion": not (model.is_moe and model.add_bias_linear),
        "apply_rope_fusion": model.position_embedding_type == "rope" and model.multi_latent_attention is None,
        "moe_permute_fusion": model.is_moe,
        # Transformer Engine can add weight gradients to the fp32 buffer by itself, but the output layer is
        # megatron-core's own, which needs NVIDIA Apex for it.
        "gradient_accumulation_fusion": fuses_weight_gradients(),
        **(_fp8(model, parallel, precision) if isinstance(precision, Fp8Precision) else {}),
    }


def _fp8(model: ModelConfig, parallel: ParallelConfig, precision: Fp8Precision) -> dict[str, Any]:
    """Transformer Engine's FP8. config/backend_rules.py refuses what a recipe would ignore or cannot do."""
    start, end = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    return {
        "fp8": precision.format,
        "fp8_recipe": precision.recipe,
        "fp8_margin": precision.margin,
        "fp8_amax_history_len": precision.amax_history_len,
        "fp8_amax_compute_algo": precision.amax_compute_algo,
        "first_last_layers_bf16": start + end > 0,
        "num_layers_at_start_in_bf16": start,
        "num_layers_at_end_in_bf16": end,
        # Experts take tokens in multiples of 16 or 32. Padding the routing saves the copy into padded rows, but the
        # all-gather dispatcher cannot; there the experts pad.
        "moe_router_padding_for_quantization": model.is_moe and parallel.moe_token_dispatcher_type == "alltoall",
    }


def _moe(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    if model.num_moe_experts is None:
        return {}
    return {
        "num_moe_experts": model.num_moe_experts,
        "moe_ffn_hidden_size": model.expert_ffn_hidden_size,
        "moe_layer_freq": [int(is_moe) for is_moe in model.moe_layer_pattern],
        "moe_router_topk": model.moe_router_topk,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_topk_scaling_factor": model.moe_router_topk_scaling_factor,
        "moe_router_load_balancing_type": model.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_router_dtype": "fp32",
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "moe_token_dispatcher_type": parallel.moe_token_dispatcher_type,
        "moe_grouped_gemm": True,
    }


def _parallelism(parallel: ParallelConfig) -> dict[str, Any]:
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.etp,
        "sequence_parallel": parallel.sequence_parallel,
        # With two stages, batched point-to-point messages of the interleaved schedule arrive in the wrong order:
        # activations and gradients are swapped, silently (core_guard.py). Overlapped messages are right.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def _recompute(recompute: RecomputeConfig) -> dict[str, Any]:
    if recompute.granularity is None:
        return {}
    if recompute.granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(recompute.modules)}
    return {
        "recompute_granularity": "full",
        "recompute_method": recompute.method,
        "recompute_num_layers": recompute.num_layers,
    }
