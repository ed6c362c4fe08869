"""Rules of the escape hatch to fields of megatron-core."""

from typing import Any

from megatron_ext.config.rules.registry import rule


@rule("model.transformer_overrides")
def _overrides_stay_in_their_lane(overrides: dict[str, Any]) -> str | None:
    owned = sorted(set(overrides) & OWNED_BY_US)
    return f"{', '.join(owned)}: set through this file's own keys, not as an override" if owned else None


OWNED_BY_US = frozenset(
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels layernorm_epsilon "
    "init_method_std num_moe_experts moe_ffn_hidden_size moe_router_topk moe_router_pre_softmax "
    "moe_router_topk_scaling_factor moe_shared_expert_intermediate_size moe_layer_freq "
    "moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff moe_router_score_function "
    "moe_router_num_groups moe_router_group_topk moe_router_enable_expert_bias moe_router_bias_update_rate "
    "moe_expert_capacity_factor moe_token_drop_policy moe_shared_expert_gate tensor_model_parallel_size "
    "pipeline_model_parallel_size virtual_pipeline_model_parallel_size context_parallel_size "
    "expert_model_parallel_size expert_tensor_parallel_size sequence_parallel moe_token_dispatcher_type "
    "recompute_granularity recompute_method recompute_num_layers recompute_modules params_dtype pipeline_dtype bf16 "
    "calculate_per_token_loss batch_p2p_comm overlap_p2p_comm perform_initialization "
    "activation_func add_bias_linear add_qkv_bias attention_dropout gated_linear_unit hidden_dropout "
    "multi_latent_attention normalization qk_layernorm".split()
)
"""TransformerConfig fields that this framework derives; an override could contradict them silently."""
