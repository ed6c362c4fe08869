"""Floating-point operations of training: what a model asks for, whatever a machine does besides."""

from megatron_ext.config import ModelConfig


def training_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Model FLOPs of the forward and backward pass of one token.

    6 for each multiply-add of a matrix product (2 forward, 4 backward), causal attention counted as half of the full
    score matrix, as in Megatron-LM (core_v0.16.0, training.py). The router, norms, biases and recomputed activations
    are not counted.
    """
    hidden = model.hidden_size
    attention = (_latent_attention if model.multi_latent_attention else _attention)(model, sequence_length)
    moe_layers = sum(model.moe_layer_pattern)
    dense_layers = model.num_layers - moe_layers
    expert_width = model.moe_router_topk * model.expert_ffn_hidden_size + (
        model.moe_shared_expert_intermediate_size or 0
    )
    matrices = 3 if model.gated_linear_unit else 2
    feed_forward = matrices * hidden * (expert_width * moe_layers + model.ffn_hidden_size * dense_layers)
    return 6.0 * (model.num_layers * attention + feed_forward + hidden * model.padded_vocab_size)


def _attention(model: ModelConfig, sequence_length: int) -> float:
    """Multiply-adds a token of grouped-query attention in one layer."""
    hidden, head = model.hidden_size, model.head_dim
    queries, keys = model.num_attention_heads * head, model.query_groups * head
    return hidden * (queries + 2 * keys) + queries * hidden + queries * sequence_length


def _latent_attention(model: ModelConfig, sequence_length: int) -> float:
    """Multiply-adds a token of latent attention in one layer, keys and values made from the latent vector."""
    latent = model.multi_latent_attention
    assert latent is not None
    hidden, heads = model.hidden_size, model.num_attention_heads
    queries, values = heads * model.head_dim, heads * latent.v_head_dim
    rank = latent.q_lora_rank
    to_queries = hidden * queries if rank is None else rank * (hidden + queries)
    to_latent = hidden * (latent.kv_lora_rank + latent.qk_pos_emb_head_dim)
    to_keys_and_values = latent.kv_lora_rank * heads * (latent.qk_head_dim + latent.v_head_dim)
    core = (queries + values) * sequence_length / 2
    return to_queries + to_latent + to_keys_and_values + core + values * hidden
