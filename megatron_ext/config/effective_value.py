"""What a model is, apart from how its configuration is spelled."""

from dataclasses import replace
from typing import Any

from megatron_ext.config.model import ModelConfig
from megatron_ext.config.model_fields import EXPERT_FIELDS, TRAINING_FIELDS, is_training_only


def effective_value(model: ModelConfig, name: str) -> Any:
    """The value of a field with its default applied, so that two spellings of one model are equal."""
    if not model.is_moe and name in EXPERT_FIELDS:
        return None
    rotates, softmax = model.position_embedding_type == "rope", model.moe_router_score_function == "softmax"
    # A softmax over the selected experts is one over all of them, divided by its sum over the selected ones.
    sums_to_one = model.normalizes_topk or (softmax and not model.moe_router_pre_softmax)
    latent = model.multi_latent_attention
    windows = model.window_layer_pattern
    applied = {
        "multi_latent_attention": latent and replace(latent, latent_norm_epsilon=model.latent_norm_epsilon),
        "sliding_window": model.sliding_window if any(windows) else None,
        "window_attn_skip_freq": windows,
        "rotary_base": model.rotary_base if rotates else None,
        "rotary_percent": model.rotary_percent if rotates else None,
        "rope_scaling": model.rope_scaling if rotates else None,
        "ffn_hidden_size": model.ffn_hidden_size if model.has_dense_layers else None,
        "max_position_embeddings": model.max_position_embeddings if model.length_shapes_model else None,
        "add_qkv_bias": model.has_qkv_bias,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_dim,
        "make_vocab_size_divisible_by": model.padded_vocab_size,
        "moe_ffn_hidden_size": model.expert_ffn_hidden_size if model.is_moe else None,
        "moe_layer_freq": model.moe_layer_pattern,
        "moe_first_k_dense": None,
        "moe_router_norm_topk_prob": sums_to_one,
        "moe_router_pre_softmax": None,
        "moe_router_topk_scaling_factor": model.moe_router_topk_scaling_factor or 1.0,
        "transformer_overrides": model.function_overrides,
    }
    value = applied.get(name, getattr(model, name))
    # Noise without weights may come and go. A field of training itself keeps its value, for those who ask for it.
    return None if name not in TRAINING_FIELDS and is_training_only(value) else value
