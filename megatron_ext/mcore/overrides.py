"""model.transformer_overrides: which of megatron-core's own fields may be set, since our modules compute them."""

import dataclasses
import difflib
import typing
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConfigError
from megatron_ext.runtime.core_guard import complaints_about

# Our modules would not read these: the model would train as if they had not been set.
_NOT_COMPUTED = {
    "attention is causal, with plain softmax": (
        "apply_query_key_layer_scaling attention_backend attention_output_gate "
        "attention_softmax_in_fp32 flash_decode log_max_attention_logit qk_clip qk_clip_alpha qk_clip_threshold "
        "qk_l2_norm"
    ),
    "windows and sinks are those of model.sliding_window, window_attn_skip_freq and attention_sinks": (
        "softmax_type window_attn_skip_freq window_size"
    ),
    "every layer is attention and a feed-forward network": (
        "dsa_indexer_head_dim dsa_indexer_loss_coeff dsa_indexer_n_heads dsa_indexer_topk dsa_indexer_use_sparse_loss "
        "experimental_attention_variant heterogeneous_block_specs is_hybrid_model linear_attention_freq "
        "linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads linear_num_value_heads linear_value_head_dim "
        "mtp_loss_scaling_factor mtp_num_layers"
    ),
    "feed-forward networks are plain or gated, with the activation of model.activation_func": (
        "moe_apply_probs_on_input moe_latent_size moe_shared_expert_gate use_te_activation_func"
    ),
    "norms are those of model.normalization": "layernorm_zero_centered_gamma",
    "weights are drawn by parameter name, with model.init_method_std": (
        "embedding_init_method embedding_init_method_std init_method init_model_with_meta_device "
        "mup_attn_scale_power mup_base_head_dim mup_base_hidden_size mup_embedding_mult mup_output_mult mup_width_mult "
        "output_layer_init_method use_cpu_initialization use_mup"
    ),
    "precision is set by precision.kind": (
        "autocast_dtype enable_autocast first_last_layers_bf16 fp16 fp4 fp4_param fp4_recipe fp8_dot_product_attention "
        "fp8_multi_head_attention fp8_output_proj moe_router_dtype num_layers_at_end_in_bf16 "
        "num_layers_at_start_in_bf16 quant_recipe"
    ),
    "the router is this framework's own": (
        "moe_enable_routing_replay moe_input_jitter_eps moe_per_layer_logging "
        "moe_router_force_load_balancing moe_router_fusion"
    ),
    "context parallelism gathers keys and values, and is set by parallel.context_parallel_size": (
        "cp_comm_type hierarchical_context_parallel_sizes hybrid_context_parallel max_seqlen_per_dp_cp_rank"
    ),
    "activations are kept, moved or recomputed as section recompute says": (
        "activation_offload_fraction delay_offload_until_cuda_graph fine_grained_activation_offloading "
        "fine_grained_offloading_max_inflight_offloads min_offloaded_tensor_size moe_paged_stash "
        "moe_paged_stash_buffer_size_factor_cpu moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_page_size "
        "offload_modules"
    ),
    "how tokens travel is said by parallel.moe_token_dispatcher_type, moe_flex_dispatcher_backend and "
    "moe_shared_expert_overlap": (
        "moe_enable_deepep moe_expert_rank_capacity_factor moe_flex_dispatcher_backend moe_shared_expert_overlap "
        "moe_token_dispatcher_type"
    ),
    "forward passes of micro-batches are not interleaved layer by layer": "overlap_moe_expert_parallel_comm",
    "layers are built from what runtime.backend says": "moe_grouped_gemm moe_use_legacy_grouped_gemm transformer_impl",
    "these steps are always computed by our own code": (
        "bias_activation_fusion cross_entropy_fusion_impl cross_entropy_loss_fusion"
    ),
}

_WRONG = {
    # docs/precision.md, "CUDA graphs"; each reason of it has a test (tests/unit/mcore/test_cuda_graphs.py).
    "layers are not captured as CUDA graphs: a replay repeats neither what routers count, which moves expert biases "
    "and coefficients, nor the casts of FP8 weights once a step, and in validation it repeats a training pass": (
        "cuda_graph_impl cuda_graph_modules cuda_graph_retain_backward_graph cuda_graph_scope "
        "cuda_graph_use_single_mempool cuda_graph_warmup_steps enable_cuda_graph external_cuda_graph "
        "inference_cuda_graph_scope moe_pad_experts_for_cuda_graph_inference"
    ),
}
"""With these a model would be trained wrongly, or not as they say."""


def check_overrides(model: ModelConfig) -> None:
    """Raise ConfigError naming every override that would not do what it says.

    It is no field of the installed megatron-core, brings back one of its known faults, or is not read by our modules.
    """
    overrides = model.transformer_overrides
    complaints = complaints_about(overrides)
    hints = typing.get_type_hints(TransformerConfig)
    known = [field.name for field in dataclasses.fields(TransformerConfig)]
    reasons = {
        name: f"{reason}; this would be ignored" for reason, names in _NOT_COMPUTED.items() for name in names.split()
    }
    reasons |= {name: reason for reason, names in _WRONG.items() for name in names.split()}
    for name in overrides:
        where = f"model.transformer_overrides.{name}"
        if name not in known and name not in reasons:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "see megatron.core.transformer.TransformerConfig"
            complaints.append(f"{where}: no such field in megatron-core; {hint}")
        elif name in reasons:
            complaints.append(f"{where}: {reasons[name]}. Remove it")
        elif not _fits(hints[name], overrides[name]):
            complaints.append(f"{where} = {overrides[name]!r}: must be {hints[name]}")
    if complaints:
        raise ConfigError("\n".join(complaints))


def _fits(hint: Any, value: Any) -> bool:
    """Whether `value` is of the declared type `hint`."""
    settings = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    try:
        TypeAdapter(hint, config=settings).validate_python(value)
    except ValidationError:
        return False
    return True
