"""Llama and every model of its shape: `LlamaForCausalLM`."""

from megatron_ext.architectures.tables.attention_fields import Activation, Groups, HeadWidth, LinearBiases
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.fields import ConfigRule, Field, Fixed, Inverted
from megatron_ext.architectures.tables.rope import Rope
from megatron_ext.architectures.tables.rules import (
    GateUp,
    Qkv,
    Rename,
    Rule,
    bias_of,
    in_dense_layers,
    untied,
    with_biases,
)
from megatron_ext.architectures.tables.storage_variants import Drop
from megatron_ext.config import ModelConfig

LAYER = "model.layers.{layer}"
MEGATRON_LAYER = "decoder.layers.{layer}"

SIZES: tuple[ConfigRule, ...] = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "hidden_size"),
    Field("num_hidden_layers", "num_layers"),
    Field("num_attention_heads", "num_attention_heads"),
    Field("attention_dropout", "attention_dropout", default=0.0),
    Field("initializer_range", "init_method_std", default=0.02),
    Inverted("tie_word_embeddings", "untie_embeddings_and_output_weights"),
)
"""What the classes of Llama's shape have in common."""

SHAPE: tuple[ConfigRule, ...] = (
    *SIZES,
    Field("intermediate_size", "ffn_hidden_size"),
    Groups(),
    HeadWidth("divides"),
    Field("max_position_embeddings", "max_position_embeddings", default=2048),
    Field("rms_norm_eps", "layernorm_epsilon", default=1e-6),
    Rope(partial=None),
)

CONFIG: tuple[ConfigRule, ...] = (
    *SHAPE,
    Fixed("hidden_act", "silu"),
    Fixed("attention_bias", False),
    Fixed("mlp_bias", False),
)
"""Llama's fields where activation and biases cannot be chosen."""

EMBEDDINGS: tuple[Rule, ...] = (
    Rename("embedding.word_embeddings.weight", hf="model.embed_tokens.weight", vocab=True),
    Rename("decoder.final_layernorm.weight", hf="model.norm.weight"),
    Rename("output_layer.weight", untied, hf="lm_head.weight", vocab=True),
)

NORMS: tuple[Rule, ...] = (
    Rename(f"{MEGATRON_LAYER}.input_layernorm.weight", hf=f"{LAYER}.input_layernorm.weight"),
    Rename(f"{MEGATRON_LAYER}.pre_mlp_layernorm.weight", hf=f"{LAYER}.post_attention_layernorm.weight"),
)

QKV = Qkv(
    f"{MEGATRON_LAYER}.self_attention.linear_qkv.weight",
    q=f"{LAYER}.self_attn.q_proj.weight",
    k=f"{LAYER}.self_attn.k_proj.weight",
    v=f"{LAYER}.self_attn.v_proj.weight",
)
PROJECTION = Rename(f"{MEGATRON_LAYER}.self_attention.linear_proj.weight", hf=f"{LAYER}.self_attn.o_proj.weight")

QK_NORMS: tuple[Rule, ...] = (
    Rename(f"{MEGATRON_LAYER}.self_attention.q_layernorm.weight", hf=f"{LAYER}.self_attn.q_norm.weight"),
    Rename(f"{MEGATRON_LAYER}.self_attention.k_layernorm.weight", hf=f"{LAYER}.self_attn.k_norm.weight"),
)

TRUNK: tuple[Rule, ...] = (*EMBEDDINGS, *NORMS, QKV, PROJECTION)
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

DROPS = (Drop("model.layers.{layer}.self_attn.rotary_emb.inv_freq", "a buffer that older versions of the class saved"),)


def dense_only(model: ModelConfig) -> str | None:
    """A reason against classes without experts."""
    return "it has no experts" if model.is_moe else None


LLAMA = Architecture(
    name="llama",
    hf_class="LlamaForCausalLM",
    model_type="llama",
    config=(*SHAPE, Activation("hidden_act"), LinearBiases()),
    weights=(*TRUNK, *DENSE_FFN, *(bias_of(rule, with_biases) for rule in (QKV, PROJECTION, *DENSE_FFN))),
    extra_check=dense_only,
    drops=DROPS,
)
