"""What the classes of Llama's shape have in common: names of tensors, fields of config.json and weights."""

from megatron_ext.architectures.tables.fields import ConfigRule, Field, Inverted
from megatron_ext.architectures.tables.rules import GateUp, Qkv, Rename, Rule, in_dense_layers, untied
from megatron_ext.architectures.tables.storage_variants import Drop

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
"""For classes in which an absent `initializer_range` means 0.02 and an absent `tie_word_embeddings` no."""

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
