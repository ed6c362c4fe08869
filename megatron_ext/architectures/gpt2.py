"""GPT-2: learned positions, LayerNorm, GELU, biases, transposed weights: `GPT2LMHeadModel`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ext.architectures.tables.attention_fields import Activation, NoGroups, WholeHeads
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.experts import dense_only
from megatron_ext.architectures.tables.fields import Always, ConfigRule, Field, Fixed, Ignored, Inverted
from megatron_ext.architectures.tables.llama_shape import MEGATRON_LAYER
from megatron_ext.architectures.tables.rules import BlockQkv, Rename, Rule, Transpose, bias_of, everywhere, untied
from megatron_ext.architectures.tables.storage_variants import Drop
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConversionError

LAYER = "transformer.h.{layer}"
WIDTH = 768
"""What an absent `n_embd` means."""


@dataclass(frozen=True)
class InnerWidth(ConfigRule):
    """`n_inner`, the width of the feed-forward layers; null is four times the hidden size."""

    def hf_names(self) -> tuple[str, ...]:
        return ("n_inner",)

    def megatron_names(self) -> tuple[str, ...]:
        return ("ffn_hidden_size",)

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {"n_inner": None if model.ffn_hidden_size == 4 * model.hidden_size else model.ffn_hidden_size}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        width, hidden = raw.get("n_inner"), raw.get("n_embd") or WIDTH
        if width is None and isinstance(hidden, int):
            width = 4 * hidden
        return {} if width is None else {"ffn_hidden_size": width}


@dataclass(frozen=True)
class HiddenDropout(ConfigRule):
    """Dropout of the embedding and of what layers add, two rates in transformers and one in Megatron."""

    embedding: str = "embd_pdrop"
    residual: str = "resid_pdrop"

    def hf_names(self) -> tuple[str, ...]:
        return (self.embedding, self.residual)

    def megatron_names(self) -> tuple[str, ...]:
        return ("hidden_dropout",)

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return dict.fromkeys(self.hf_names(), model.hidden_dropout)

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        embedding, residual = (raw.get(name, 0.1) for name in self.hf_names())
        if embedding != residual:
            raise ConversionError(
                f"{self.embedding} = {embedding}, {self.residual} = {residual}: Megatron has one rate. It plays a part "
                "in training only; make both equal in config.json"
            )
        return {"hidden_dropout": residual}


CONFIG: tuple[ConfigRule, ...] = (
    Field("vocab_size", "vocab_size", default=50257),
    Field("n_embd", "hidden_size", default=WIDTH),
    Field("n_layer", "num_layers", default=12),
    Field("n_head", "num_attention_heads", default=12),
    Field("n_positions", "max_position_embeddings", default=1024),
    Field("layer_norm_epsilon", "layernorm_epsilon", default=1e-5),
    Field("attn_pdrop", "attention_dropout", default=0.1),
    Field("initializer_range", "init_method_std", default=0.02),
    InnerWidth(),
    HiddenDropout(),
    WholeHeads(),
    NoGroups(),
    Activation("activation_function", tanh="gelu_new", default="gelu_new"),
    Inverted("tie_word_embeddings", "untie_embeddings_and_output_weights", default=True),
    Always("position_embedding_type", "learned_absolute"),
    Always("normalization", "LayerNorm"),
    Always("gated_linear_unit", False),
    Always("add_bias_linear", True),
    Fixed("scale_attn_weights", True),
    Fixed("scale_attn_by_inverse_layer_idx", False),
    Fixed("add_cross_attention", False),
    # The first says in which precision attention rounds, the second is an older name of n_positions, and the others are
    # of models with another head or of pipelines.
    Ignored(("reorder_and_upcast_attn", "n_ctx", "task_specific_params")),
    Ignored(
        tuple(f"summary_{x}" for x in "type use_proj activation proj_to_labels first_dropout last_dropout".split())
    ),
)

QKV = BlockQkv(f"{MEGATRON_LAYER}.self_attention.linear_qkv.weight", hf=f"{LAYER}.attn.c_attn.weight")
LINEAR = {
    "self_attention.linear_proj": "attn.c_proj",
    "mlp.linear_fc1": "mlp.c_fc",
    "mlp.linear_fc2": "mlp.c_proj",
}
NORMS = {
    f"{MEGATRON_LAYER}.input_layernorm": f"{LAYER}.ln_1",
    f"{MEGATRON_LAYER}.pre_mlp_layernorm": f"{LAYER}.ln_2",
    "decoder.final_layernorm": "transformer.ln_f",
}


def _weights() -> tuple[Rule, ...]:
    rules: list[Rule] = [
        Rename("embedding.word_embeddings.weight", hf="transformer.wte.weight", vocab=True),
        Rename("embedding.position_embeddings.weight", hf="transformer.wpe.weight"),
        Rename("output_layer.weight", untied, hf="lm_head.weight", vocab=True),
    ]
    for megatron, hf in NORMS.items():
        weight = Rename(f"{megatron}.weight", hf=f"{hf}.weight")
        rules += [weight, bias_of(weight, everywhere)]
    rules += [QKV, bias_of(QKV, everywhere)]
    for megatron, hf in LINEAR.items():
        rules.append(Transpose(f"{MEGATRON_LAYER}.{megatron}.weight", hf=f"{LAYER}.{hf}.weight"))
        rules.append(Rename(f"{MEGATRON_LAYER}.{megatron}.bias", hf=f"{LAYER}.{hf}.bias"))
    return tuple(rules)


GPT2 = Architecture(
    name="gpt2",
    hf_class="GPT2LMHeadModel",
    model_type="gpt2",
    config=CONFIG,
    weights=_weights(),
    extra_check=dense_only,
    drops=(
        Drop(f"{LAYER}.attn.bias", "the causal mask, which older versions saved"),
        Drop(f"{LAYER}.attn.masked_bias", "the value of masked scores, which older versions saved"),
    ),
    prefix="transformer.",
)
