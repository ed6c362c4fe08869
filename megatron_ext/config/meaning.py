"""What a model is, apart from how its configuration is spelled."""

from typing import Any

from megatron_ext.config.model import ModelConfig
from megatron_ext.config.routing import LearnedNoise


def meaning(model: ModelConfig, name: str) -> Any:
    """The value of a field with its default applied, so that two spellings of one model are equal."""
    applied = {
        "max_position_embeddings": model.max_position_embeddings if model.length_shapes_model else None,
        "add_qkv_bias": model.has_qkv_bias,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_dim,
        "make_vocab_size_divisible_by": model.padded_vocab_size,
        "moe_ffn_hidden_size": model.expert_ffn_hidden_size if model.is_moe else None,
        "moe_layer_freq": model.moe_layer_pattern,
        "moe_first_k_dense": None,
        "moe_router_norm_topk_prob": model.normalizes_topk,
        # Only learned noise has weights; the others may come and go.
        "moe_router_noise": model.moe_router_noise if isinstance(model.moe_router_noise, LearnedNoise) else None,
        "transformer_overrides": model.function_overrides,
    }
    return applied.get(name, getattr(model, name))
