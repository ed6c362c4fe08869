"""The one translation of our configuration into megatron-core's TransformerConfig."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_ext.config import Fp8Precision, ModelConfig, ParallelConfig, Precision, RecomputeConfig, YarnRopeScaling
from megatron_ext.config.machine import Backend
from megatron_ext.errors import ConfigError
from megatron_ext.mcore.activation import quick_gelu
from megatron_ext.mcore.overrides import check_overrides
from megatron_ext.mcore.rotary import softmax_factor
from megatron_ext.runtime.accelerators import fuses_weight_gradients

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Dtype of weights and activations under each kind of precision."""


@dataclass(kw_only=True)
class _MoreFields:
    """What layers read of the configuration beside megatron-core's declared fields."""

    torch_fp8: Fp8Precision | None = None
    """The recipe of mcore/fp8; megatron-core's own `fp8` field speaks to Transformer Engine alone."""
    triton_kernels: bool = False
    """Whether the torch backend's layers and loss take our own kernels (mcore/kernels/) where there are some."""
    compiles_router: bool = False
    """Whether what follows from a router's logits is one compiled graph (mcore/moe/route.py)."""
    recompute_norms: bool = False
    """Whether the torch backend computes norms again in the backward pass (mcore/norms_again.py)."""
    adds_weight_gradients: bool = False
    """Whether linear layers and experts add weights' gradients to the fp32 buffer (mcore/linear.py)."""
    recompute_logits: bool = False
    """Whether the output layer computes losses by parts of the vocabulary (mcore/output_layer.py)."""
    offload_layers: int = 0
    """How many layers of a chunk keep what they keep in the host's memory (mcore/offload.py)."""
    offload_min_bytes: int = 1
    """But for storages smaller than this."""
    yarn_rotary_scaling_factor: float = 1.0
    """megatron-core's attention looks for this name and the next two, which it declares nowhere, and takes YaRN's
    factor on queries and keys from them; at 1.0 there is none."""
    yarn_mscale: float | None = None
    yarn_mscale_all_dim: float | None = None


@dataclass
class ExtendedConfig(_MoreFields, TransformerConfig):
    """megatron-core's configuration of a transformer with the fields above."""


@dataclass
class ExtendedMLAConfig(_MoreFields, MLATransformerConfig):
    """The same with multi-head latent attention."""


LayerConfig = ExtendedConfig | ExtendedMLAConfig


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    recompute: RecomputeConfig,
    backend: Backend = "torch",
) -> LayerConfig:
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
        **_recompute(recompute, backend),
        **_yarn(model),
        **(_transformer_engine(model, parallel, precision) if backend == "transformer_engine" else {}),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "recompute_logits": recompute.logits,
        "offload_layers": recompute.offload_layers,
        "offload_min_bytes": recompute.offload_min_bytes,
        "torch_fp8": precision if isinstance(precision, Fp8Precision) and backend == "torch" else None,
        **model.transformer_overrides,
    }
    try:
        config: LayerConfig
        if model.multi_latent_attention is None:
            config = ExtendedConfig(**fields)
        else:
            config = ExtendedMLAConfig(**{**fields, **_latent_attention(model)})
    except (ValueError, AssertionError, TypeError, ImportError) as error:
        raise ConfigError(f"megatron-core refuses this model: {error}") from error
    # Set only now: it refuses experts with biases under expert tensor parallelism, since its own add a bias once a
    # rank. Ours add it once (core_guard.py, mcore/moe/experts.py).
    config.add_bias_linear = model.add_bias_linear
    return config


def is_plain_swiglu(model: ModelConfig) -> bool:
    """Whether feed-forward networks are `silu(gate) * up` and no more."""
    changed = model.activation_func_clamp_value is not None or model.glu_linear_offset != 0.0
    return model.gated_linear_unit and model.activation_func == "silu" and not changed


def _leave_as_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh, "quick_gelu": quick_gelu}


def _architecture(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_dim,
        "layernorm_epsilon": model.layernorm_epsilon,
        "normalization": model.normalization,
        "gated_linear_unit": model.gated_linear_unit,
        "activation_func": _ACTIVATIONS[model.activation_func],
        "activation_func_clamp_value": model.activation_func_clamp_value,
        "glu_linear_offset": model.glu_linear_offset,
        "add_bias_linear": False,
        "add_qkv_bias": model.has_qkv_bias,
        # Norms over a whole projection are our own, split as it is: their gradients must not be summed over TP ranks.
        "qk_layernorm": model.qk_layernorm == "head",
        # It counts a window without the query's own position.
        "window_size": None if model.sliding_window is None else (model.sliding_window - 1, 0),
        "window_attn_skip_freq": [int(has_window) for has_window in model.window_layer_pattern],
        "softmax_type": "learnable" if model.attention_sinks else "vanilla",
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
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


def _yarn(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope_scaling
    if not isinstance(scaling, YarnRopeScaling):
        return {}
    return {
        "yarn_rotary_scaling_factor": scaling.factor,
        "yarn_mscale": scaling.mscale or None,
        "yarn_mscale_all_dim": scaling.mscale_all_dim or None,
    }


def _latent_attention(model: ModelConfig) -> dict[str, Any]:
    latent = model.multi_latent_attention
    assert latent is not None
    return {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_head_dim": latent.qk_head_dim,
        "qk_pos_emb_head_dim": latent.qk_pos_emb_head_dim,
        "v_head_dim": latent.v_head_dim,
        # What is common to all attention takes the head width for that of the values (mla.py).
        "kv_channels": latent.v_head_dim,
        "softmax_scale": softmax_factor(model) / math.sqrt(model.head_dim),
        # The angles are our own (rotary.py); this is the branch that takes a factor with them.
        "rope_type": "yarn",
    }


def _transformer_engine(model: ModelConfig, parallel: ParallelConfig, precision: Precision) -> dict[str, Any]:
    """What differs with Transformer Engine: its layers, its fused kernels and its FP8."""
    return {
        "transformer_impl": "transformer_engine",
        # megatron-core's fused kernel of SwiGLU neither clamps nor adds an offset, its one of quick GELU knows routed
        # experts alone; what is not fused computes all of it.
        "bias_activation_fusion": is_plain_swiglu(model),
        "bias_dropout_fusion": not (model.is_moe and model.add_bias_linear),
        "apply_rope_fusion": model.position_embedding_type == "rope" and model.multi_latent_attention is None,
        "moe_permute_fusion": model.is_moe,
        # Transformer Engine adds weight gradients to the fp32 buffer by itself. megatron-core's own output layer needs
        # NVIDIA Apex for it (model.py), and so does computing that one's gradient late.
        "gradient_accumulation_fusion": fuses_weight_gradients()
        or not model.transformer_overrides.get("defer_embedding_wgrad_compute"),
        **(_fp8(model, parallel, precision) if isinstance(precision, Fp8Precision) else {}),
    }


def _fp8(model: ModelConfig, parallel: ParallelConfig, precision: Fp8Precision) -> dict[str, Any]:
    """Transformer Engine's FP8. config/rules/backend.py refuses what a recipe would ignore or cannot do."""
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
        # What the token dispatcher reads of the router; the router itself (moe/router.py) reads `model`.
        "moe_router_topk": model.moe_router_topk,
        "moe_router_pre_softmax": True,
        "moe_expert_capacity_factor": model.moe_expert_capacity_factor,
        "moe_pad_expert_input_to_capacity": model.moe_pad_expert_input_to_capacity,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": model.moe_shared_expert_gate,
        "moe_token_dispatcher_type": parallel.moe_token_dispatcher_type,
        "moe_flex_dispatcher_backend": parallel.flex_backend or "deepep",
        "moe_shared_expert_overlap": parallel.moe_shared_expert_overlap,
        "moe_grouped_gemm": True,
    }


def _parallelism(parallel: ParallelConfig) -> dict[str, Any]:
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "account_for_embedding_in_pipeline_split": parallel.account_for_embedding_in_pipeline_split,
        "account_for_loss_in_pipeline_split": parallel.account_for_loss_in_pipeline_split,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.etp,
        "sequence_parallel": parallel.sequence_parallel,
        # With two stages, batched point-to-point messages of the interleaved schedule arrive in the wrong order:
        # activations and gradients are swapped, silently (core_guard.py). Overlapped messages are right.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def _recompute(recompute: RecomputeConfig, backend: Backend) -> dict[str, Any]:
    if recompute.granularity is None:
        return {}
    if recompute.granularity == "selective":
        ours = backend == "torch" and "layernorm" in recompute.modules
        modules = [module for module in recompute.modules if not (ours and module == "layernorm")]
        rest = {"recompute_granularity": "selective", "recompute_modules": modules} if modules else {}
        return {"recompute_norms": ours, **rest}
    return {
        "recompute_granularity": "full",
        "recompute_method": recompute.method,
        "recompute_num_layers": recompute.num_layers,
    }
