"""Floating-point operations of training: what a model asks for, whatever a machine does besides."""

from megatron_ext.canonical.adapters import adapter_pairs
from megatron_ext.config import PRETRAIN, LoraConfig, ModelConfig, PreferenceTask, TaskConfig


def training_flops_per_token(
    model: ModelConfig, sequence_length: int, adapters: LoraConfig | None = None, task: TaskConfig = PRETRAIN
) -> float:
    """Model FLOPs of the forward and backward pass of one token, and of the pass of a reference if `task` has one.

    6 for each multiply-add of a matrix product (2 forward, 4 backward), causal attention counted as half of the full
    score matrix, as in Megatron-LM (core_v0.16.0, training.py), and of a window as the scores that are in it. The
    router, norms, biases and recomputed activations are not counted. With `adapters` 4 for each multiply-add with a
    weight, whose own gradient nobody asks for.
    """
    hidden = model.hidden_size
    attention = attention_products(model, sequence_length)
    moe_layers = sum(model.moe_layer_pattern)
    dense_layers = model.num_layers - moe_layers
    expert_width = model.moe_router_topk * model.expert_ffn_hidden_size + (
        model.moe_shared_expert_intermediate_size or 0
    )
    matrices = 3 if model.gated_linear_unit else 2
    feed_forward = matrices * hidden * (expert_width * moe_layers + model.ffn_hidden_size * dense_layers)
    products = model.num_layers * attention + feed_forward + hidden * model.padded_vocab_size
    if adapters is None:
        return 6.0 * products
    core = model.num_layers * _core(model, sequence_length)
    is_read_twice = isinstance(task, PreferenceTask) and task.reference_of(has_adapters=True) == "adapters_off"
    reference = 2.0 * products if is_read_twice else 0.0
    return 4.0 * (products - core) + 6.0 * (core + _of_adapters(model, adapters)) + reference


def attention_products(model: ModelConfig, sequence_length: int) -> float:
    """Multiply-adds a token of a layer's attention, forward, on average over the layers.

    With a length of 0 of its projections alone.
    """
    return (_latent_attention if model.multi_latent_attention else _attention)(model, sequence_length)


def _of_adapters(model: ModelConfig, adapters: LoraConfig) -> float:
    """Multiply-adds a token of all adapters: of routed experts, of those that work; a looked-up table has half."""
    works = model.moe_router_topk / model.num_moe_experts if model.num_moe_experts else 1.0
    return sum(
        pair.rank * ((0 if pair.is_embedding else pair.inputs) + pair.outputs) * (works if pair.is_expert else 1.0)
        for pair in adapter_pairs(model, adapters)
    )


def _core(model: ModelConfig, sequence_length: int) -> float:
    """Multiply-adds a token of attention itself in a layer, on average over the layers."""
    queries, latent = model.num_attention_heads * model.head_dim, model.multi_latent_attention
    values = queries if latent is None else model.num_attention_heads * latent.v_head_dim
    return (queries + values) * attended_keys(model, sequence_length)


def attended_keys(model: ModelConfig, sequence_length: int) -> float:
    """Keys that a query meets, on average over the queries of a sequence and the layers: half of them if causal."""
    windows = sum(model.window_layer_pattern)
    within = min(model.sliding_window or sequence_length, sequence_length)
    # The first `within` queries meet half as many, the others all of them.
    near = within - within**2 / (2 * sequence_length) if sequence_length else 0.0
    return (windows * near + (model.num_layers - windows) * sequence_length / 2) / model.num_layers


def _attention(model: ModelConfig, sequence_length: int) -> float:
    """Multiply-adds a token of grouped-query attention in one layer."""
    hidden, head = model.hidden_size, model.head_dim
    queries, keys = model.num_attention_heads * head, model.query_groups * head
    return hidden * (queries + 2 * keys) + queries * hidden + _core(model, sequence_length)


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
    products = to_queries + to_latent + to_keys_and_values + values * hidden
    return products + _core(model, sequence_length)
