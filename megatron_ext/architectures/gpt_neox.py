"""GPT-NeoX with its layers in sequence (CALM1): `GPTNeoXForCausalLM`."""

from megatron_ext.architectures.tables.attention_fields import Activation, NoGroups, WholeHeads
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.experts import dense_only
from megatron_ext.architectures.tables.fields import Always, ConfigRule, Field, Fixed, Ignored, Inverted
from megatron_ext.architectures.tables.llama_shape import MEGATRON_LAYER
from megatron_ext.architectures.tables.rope import Rope
from megatron_ext.architectures.tables.rules import Rename, Rule, bias_of, everywhere, untied
from megatron_ext.architectures.tables.storage_variants import Alias, Drop

LAYER = "gpt_neox.layers.{layer}"

CONFIG: tuple[ConfigRule, ...] = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "hidden_size"),
    Field("intermediate_size", "ffn_hidden_size"),
    Field("num_hidden_layers", "num_layers"),
    Field("num_attention_heads", "num_attention_heads"),
    Field("max_position_embeddings", "max_position_embeddings", default=2048),
    Field("layer_norm_eps", "layernorm_epsilon", default=1e-5),
    Field("attention_dropout", "attention_dropout", default=0.0),
    Field("hidden_dropout", "hidden_dropout", default=0.0),
    Field("initializer_range", "init_method_std", default=0.02),
    WholeHeads(),
    NoGroups(),
    Activation("hidden_act", default="gelu"),
    Inverted("tie_word_embeddings", "untie_embeddings_and_output_weights"),
    Always("normalization", "LayerNorm"),
    Always("gated_linear_unit", False),
    Always("add_bias_linear", True),
    # Absent means true: attention and feed-forward layer side by side, which Megatron's layers are not.
    Fixed("use_parallel_residual", False, also=()),
    Fixed("attention_bias", True),
    Rope(partial=0.25, theta_name="rotary_emb_base", partial_name="rotary_pct"),
    # Of models with another head, and of decoders with an encoder.
    Ignored(("classifier_dropout", "is_decoder")),
)

# A head's query, key and value stand together: Megatron's layout where every head is a group.
NAMES = {
    f"{MEGATRON_LAYER}.input_layernorm": f"{LAYER}.input_layernorm",
    f"{MEGATRON_LAYER}.self_attention.linear_qkv": f"{LAYER}.attention.query_key_value",
    f"{MEGATRON_LAYER}.self_attention.linear_proj": f"{LAYER}.attention.dense",
    f"{MEGATRON_LAYER}.pre_mlp_layernorm": f"{LAYER}.post_attention_layernorm",
    f"{MEGATRON_LAYER}.mlp.linear_fc1": f"{LAYER}.mlp.dense_h_to_4h",
    f"{MEGATRON_LAYER}.mlp.linear_fc2": f"{LAYER}.mlp.dense_4h_to_h",
    "decoder.final_layernorm": "gpt_neox.final_layer_norm",
}


def _weights() -> tuple[Rule, ...]:
    rules: list[Rule] = [
        Rename("embedding.word_embeddings.weight", hf="gpt_neox.embed_in.weight", vocab=True),
        Rename("output_layer.weight", untied, hf="embed_out.weight", vocab=True),
    ]
    for megatron, hf in NAMES.items():
        weight = Rename(f"{megatron}.weight", hf=f"{hf}.weight")
        rules += [weight, bias_of(weight, everywhere)]
    return tuple(rules)


GPT_NEOX = Architecture(
    name="gpt_neox",
    hf_class="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    config=CONFIG,
    weights=_weights(),
    extra_check=dense_only,
    aliases=(Alias("embed_out.weight", other="lm_head.weight"),),
    drops=tuple(
        Drop(f"{LAYER}.attention.{name}", "a buffer that older versions of the class saved")
        for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
    ),
)
