"""Floating-point operations of training: what a model asks for, whatever a machine does besides."""

from megatron_ext.config import ModelConfig


def training_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Model FLOPs of the forward and backward pass of one token.

    6 for each multiply-add of a matrix product (2 forward, 4 backward), causal attention counted as half of the full
    score matrix, as in Megatron-LM (core_v0.16.0, training.py). The router and recomputed activations are not counted.
    """
    hidden, head = model.hidden_size, model.head_dim
    queries, keys = model.num_attention_heads * head, model.query_groups * head
    attention = hidden * (queries + 2 * keys) + queries * hidden + queries * sequence_length
    moe_layers = sum(model.moe_layer_pattern)
    dense_layers = model.num_layers - moe_layers
    expert_width = model.moe_router_topk * model.expert_ffn_hidden_size + (
        model.moe_shared_expert_intermediate_size or 0
    )
    feed_forward = 3 * hidden * (expert_width * moe_layers + model.ffn_hidden_size * dense_layers)
    return 6.0 * (model.num_layers * attention + feed_forward + hidden * model.padded_vocab_size)
