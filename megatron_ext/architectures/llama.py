"""Llama and every model of its shape: `LlamaForCausalLM`."""

from megatron_ext.architectures.base import Architecture
from megatron_ext.architectures.fields import Field, Fixed, Inverted, Rope
from megatron_ext.architectures.rules import GateUp, Qkv, Rename, Rule, in_dense_layers
from megatron_ext.config import ModelConfig

LAYER = "model.layers.{layer}"
MEGATRON_LAYER = "decoder.layers.{layer}"


def untied(model: ModelConfig, layer: int) -> bool:
    """Models whose output layer has weights of its own."""
    return model.untie_embeddings_and_output_weights


CONFIG = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "hidden_size"),
    Field("intermediate_size", "ffn_hidden_size"),
    Field("num_hidden_layers", "num_layers"),
    Field("num_attention_heads", "num_attention_heads"),
    Field("num_key_value_heads", "query_groups", settable="num_query_groups"),
    Field("head_dim", "head_dim", settable="kv_channels"),
    Field("max_position_embeddings", "max_position_embeddings", default=2048),
    Field("rms_norm_eps", "layernorm_epsilon", default=1e-6),
    Inverted("tie_word_embeddings", "untie_embeddings_and_output_weights"),
    Fixed("hidden_act", "silu"),
    Fixed("attention_bias", False),
    Fixed("mlp_bias", False),
    Fixed("attention_dropout", 0.0),
    Rope(),
)

TRUNK: tuple[Rule, ...] = (
    Rename("embedding.word_embeddings.weight", hf="model.embed_tokens.weight", vocab=True),
    Rename(f"{MEGATRON_LAYER}.input_layernorm.weight", hf=f"{LAYER}.input_layernorm.weight"),
    Qkv(
        f"{MEGATRON_LAYER}.self_attention.linear_qkv.weight",
        q=f"{LAYER}.self_attn.q_proj.weight",
        k=f"{LAYER}.self_attn.k_proj.weight",
        v=f"{LAYER}.self_attn.v_proj.weight",
    ),
    Rename(f"{MEGATRON_LAYER}.self_attention.linear_proj.weight", hf=f"{LAYER}.self_attn.o_proj.weight"),
    Rename(f"{MEGATRON_LAYER}.pre_mlp_layernorm.weight", hf=f"{LAYER}.post_attention_layernorm.weight"),
    Rename("decoder.final_layernorm.weight", hf="model.norm.weight"),
    Rename("output_layer.weight", untied, hf="lm_head.weight", vocab=True),
)
"""Everything but the feed-forward layers; shared by the architectures of Llama's shape."""

DENSE_FFN: tuple[Rule, ...] = (
    GateUp(
        f"{MEGATRON_LAYER}.mlp.linear_fc1.weight",
        in_dense_layers,
        gate=f"{LAYER}.mlp.gate_proj.weight",
        up=f"{LAYER}.mlp.up_proj.weight",
    ),
    Rename(f"{MEGATRON_LAYER}.mlp.linear_fc2.weight", in_dense_layers, hf=f"{LAYER}.mlp.down_proj.weight"),
)


def dense_only(model: ModelConfig) -> str | None:
    """Llama is dense."""
    return "it has no experts" if model.is_moe else None


LLAMA = Architecture(
    name="llama",
    hf_class="LlamaForCausalLM",
    model_type="llama",
    config=CONFIG,
    weights=TRUNK + DENSE_FFN,
    other=dense_only,
)
