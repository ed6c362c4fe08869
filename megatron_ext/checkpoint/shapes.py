"""The tensors a model has, by canonical name and shape: the yardstick of conversion and of parameter counts."""

from collections.abc import Iterator

from megatron_ext.checkpoint.shards import Shape
from megatron_ext.config import LearnedNoise, ModelConfig

Shapes = Iterator[tuple[str, Shape]]


def model_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Every weight of `model` by canonical name, unsplit, vocabulary padded."""
    hidden = model.hidden_size
    shapes: dict[str, Shape] = {"embedding.word_embeddings.weight": (model.padded_vocab_size, hidden)}
    if model.position_embedding_type == "learned_absolute":
        shapes["embedding.position_embeddings.weight"] = (model.max_position_embeddings, hidden)
    for layer in range(model.num_layers):
        prefix = f"decoder.layers.{layer}"
        shapes.update(_norm(model, f"{prefix}.input_layernorm", hidden))
        attention = _latent_attention if model.multi_latent_attention else _attention
        shapes.update(attention(model, f"{prefix}.self_attention"))
        shapes.update(_norm(model, f"{prefix}.pre_mlp_layernorm", hidden))
        if model.moe_layer_pattern[layer]:
            shapes.update(_moe(model, f"{prefix}.mlp"))
        else:
            shapes.update(_feed_forward(model, f"{prefix}.mlp", model.ffn_hidden_size))
    shapes.update(_norm(model, "decoder.final_layernorm", hidden))
    if model.untie_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (model.padded_vocab_size, hidden)
    return shapes


def _norm(model: ModelConfig, prefix: str, width: int) -> Shapes:
    yield f"{prefix}.weight", (width,)
    if model.normalization == "LayerNorm":
        yield f"{prefix}.bias", (width,)


def _linear(prefix: str, rows: int, columns: int, *, bias: bool = False) -> Shapes:
    yield f"{prefix}.weight", (rows, columns)
    if bias:
        yield f"{prefix}.bias", (rows,)


def _attention(model: ModelConfig, prefix: str) -> Shapes:
    hidden, head = model.hidden_size, model.head_dim
    queries, keys = model.num_attention_heads * head, model.query_groups * head
    yield from _linear(f"{prefix}.linear_qkv", queries + 2 * keys, hidden, bias=model.has_qkv_bias)
    if model.qk_layernorm == "head":
        yield from _norm(model, f"{prefix}.q_layernorm", head)
        yield from _norm(model, f"{prefix}.k_layernorm", head)
    elif model.qk_layernorm == "projection":
        yield f"{prefix}.q_layernorm.weight", (queries,)
        yield f"{prefix}.k_layernorm.weight", (keys,)
    yield from _linear(f"{prefix}.linear_proj", hidden, queries, bias=model.add_bias_linear)


def _latent_attention(model: ModelConfig, prefix: str) -> Shapes:
    latent = model.multi_latent_attention
    assert latent is not None
    hidden, heads = model.hidden_size, model.num_attention_heads
    queries = heads * (latent.qk_head_dim + latent.qk_pos_emb_head_dim)
    if latent.q_lora_rank is None:
        yield from _linear(f"{prefix}.linear_q_proj", queries, hidden)
    else:
        yield from _linear(f"{prefix}.linear_q_down_proj", latent.q_lora_rank, hidden)
        yield from _norm(model, f"{prefix}.q_layernorm", latent.q_lora_rank)
        yield from _linear(f"{prefix}.linear_q_up_proj", queries, latent.q_lora_rank)
    yield from _linear(f"{prefix}.linear_kv_down_proj", latent.kv_lora_rank + latent.qk_pos_emb_head_dim, hidden)
    yield from _norm(model, f"{prefix}.kv_layernorm", latent.kv_lora_rank)
    keys_and_values = heads * (latent.qk_head_dim + latent.v_head_dim)
    yield from _linear(f"{prefix}.linear_kv_up_proj", keys_and_values, latent.kv_lora_rank)
    yield from _linear(f"{prefix}.linear_proj", hidden, heads * latent.v_head_dim)


def _feed_forward(model: ModelConfig, prefix: str, width: int) -> Shapes:
    rows = 2 * width if model.gated_linear_unit else width
    yield from _linear(f"{prefix}.linear_fc1", rows, model.hidden_size, bias=model.add_bias_linear)
    yield from _linear(f"{prefix}.linear_fc2", model.hidden_size, width, bias=model.add_bias_linear)


def _moe(model: ModelConfig, prefix: str) -> Shapes:
    assert model.num_moe_experts is not None
    yield f"{prefix}.router.weight", (model.num_moe_experts, model.hidden_size)
    if model.moe_router_enable_expert_bias:
        yield f"{prefix}.router.expert_bias", (model.num_moe_experts,)
    if isinstance(model.moe_router_noise, LearnedNoise):
        yield f"{prefix}.router.noise_weight", (model.num_moe_experts, model.hidden_size)
    for expert in range(model.num_moe_experts):
        yield from _feed_forward(model, f"{prefix}.experts.{expert}", model.expert_ffn_hidden_size)
    if model.moe_shared_expert_intermediate_size is not None:
        yield from _feed_forward(model, f"{prefix}.shared_experts", model.moe_shared_expert_intermediate_size)
    if model.moe_shared_expert_gate:
        yield f"{prefix}.shared_experts.gate_weight", (1, model.hidden_size)
