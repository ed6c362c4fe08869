"""The tensors a model has, by canonical name and shape: the yardstick of conversion and of parameter counts."""

from collections.abc import Iterator

from megatron_ext.checkpoint.boxes import Shape
from megatron_ext.config import LearnedNoise, ModelConfig


def model_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Every weight of `model` by canonical name, unsplit, vocabulary padded."""
    hidden = model.hidden_size
    shapes: dict[str, Shape] = {"embedding.word_embeddings.weight": (model.padded_vocab_size, hidden)}
    for layer in range(model.num_layers):
        prefix = f"decoder.layers.{layer}"
        shapes.update(_attention(model, prefix))
        shapes[f"{prefix}.pre_mlp_layernorm.weight"] = (hidden,)
        if model.moe_layer_pattern[layer]:
            shapes.update(_moe(model, f"{prefix}.mlp"))
        else:
            shapes.update(_swiglu(f"{prefix}.mlp", model.ffn_hidden_size, hidden))
    shapes["decoder.final_layernorm.weight"] = (hidden,)
    if model.untie_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (model.padded_vocab_size, hidden)
    return shapes


def _attention(model: ModelConfig, prefix: str) -> Iterator[tuple[str, Shape]]:
    queries = model.num_attention_heads * model.head_dim
    rows = queries + 2 * model.query_groups * model.head_dim
    yield f"{prefix}.input_layernorm.weight", (model.hidden_size,)
    yield f"{prefix}.self_attention.linear_qkv.weight", (rows, model.hidden_size)
    yield f"{prefix}.self_attention.linear_proj.weight", (model.hidden_size, queries)


def _swiglu(prefix: str, width: int, hidden: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.linear_fc1.weight", (2 * width, hidden)
    yield f"{prefix}.linear_fc2.weight", (hidden, width)


def _moe(model: ModelConfig, prefix: str) -> Iterator[tuple[str, Shape]]:
    assert model.num_moe_experts is not None
    yield f"{prefix}.router.weight", (model.num_moe_experts, model.hidden_size)
    if model.moe_router_enable_expert_bias:
        yield f"{prefix}.router.expert_bias", (model.num_moe_experts,)
    if isinstance(model.moe_router_noise, LearnedNoise):
        yield f"{prefix}.router.noise_weight", (model.num_moe_experts, model.hidden_size)
    for expert in range(model.num_moe_experts):
        yield from _swiglu(f"{prefix}.experts.{expert}", model.expert_ffn_hidden_size, model.hidden_size)
    if model.moe_shared_expert_intermediate_size is not None:
        yield from _swiglu(f"{prefix}.shared_experts", model.moe_shared_expert_intermediate_size, model.hidden_size)
    if model.moe_shared_expert_gate:
        yield f"{prefix}.shared_experts.gate_weight", (1, model.hidden_size)
