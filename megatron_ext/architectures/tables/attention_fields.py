"""Config rules of attention, activations and biases."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_ext.architectures.tables.fields import ConfigRule
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConversionError

LATENT = {
    "kv_lora_rank": "kv_lora_rank",
    "q_lora_rank": "q_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
}
"""Latent attention's Hugging Face fields and those of `multi_latent_attention`."""
SPELLINGS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
"""Transformers' names of activations that Megatron has: they differ in how they are computed, not in what."""


@dataclass(frozen=True)
class Activation(ConfigRule):
    """The activation of the feed-forward layers."""

    hf: str
    tanh: str = "gelu_pytorch_tanh"
    """The name to write for GELU's tanh approximation; transformers has two."""
    default: str = "silu"

    def hf_names(self) -> tuple[str, ...]:
        return (self.hf,)

    def megatron_names(self) -> tuple[str, ...]:
        return ("activation_func",)

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {self.hf: self.tanh if model.activation_func == "gelu_tanh" else model.activation_func}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        stated = raw.get(self.hf) or self.default
        if not isinstance(stated, str) or stated not in SPELLINGS:
            raise ConversionError(
                f"{self.hf} = {stated!r}: can be {', '.join(SPELLINGS)}; others are not computed here"
            )
        return {"activation_func": SPELLINGS[stated]}


@dataclass(frozen=True)
class LinearBiases(ConfigRule):
    """Biases in the linear layers of attention and of the feed-forward network: Megatron has both or neither."""

    attention: str = "attention_bias"
    feed_forward: str = "mlp_bias"

    def hf_names(self) -> tuple[str, ...]:
        return (self.attention, self.feed_forward)

    def megatron_names(self) -> tuple[str, ...]:
        return ("add_bias_linear",)

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return dict.fromkeys(self.hf_names(), model.add_bias_linear)

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        attention, feed_forward = (bool(raw.get(name)) for name in self.hf_names())
        if attention != feed_forward:
            stated = f"{self.attention} = {attention}, {self.feed_forward} = {feed_forward}"
            raise ConversionError(f"{stated}: Megatron has biases in both or in neither")
        return {"add_bias_linear": attention}


@dataclass(frozen=True)
class HeadWidth(ConfigRule):
    """The width of an attention head: `head_dim`, or hidden size over heads.

    `free`: any width. `divides`: any, but transformers refuses a hidden size that is no multiple of the heads.
    `derived`: hidden size over heads, as the shapes of the class's norms or biases assume.
    """

    kind: Literal["free", "divides", "derived"] = "free"
    declared: bool = True
    """Whether the class declares the field; where it reads it all the same, it is written if it says something."""
    default: int | None = None
    """What Hugging Face means where the field is absent; None: hidden size over heads."""

    def hf_names(self) -> tuple[str, ...]:
        return ("head_dim",)

    def megatron_names(self) -> tuple[str, ...]:
        return ("kv_channels",)

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        says = self.declared or model.head_dim * model.num_attention_heads != model.hidden_size
        return {"head_dim": model.head_dim} if says and self.kind != "derived" else {}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        width = raw.get("head_dim") or self.default
        hidden, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
        if not isinstance(hidden, int) or not isinstance(heads, int) or not heads:
            return {} if width is None else {"kv_channels": width}  # what is wrong is said of those two
        if width is None and hidden % heads:
            width = hidden // heads
            if width < 1:
                raise ConversionError(f"hidden_size = {hidden}, num_attention_heads = {heads}: heads without a width")
        if self.kind == "derived" and width is not None and width * heads != hidden:
            raise ConversionError(
                f"head_dim = {width!r}, num_attention_heads = {heads}: this class has hidden_size / num_attention_heads"
            )
        return {} if width is None else {"kv_channels": width}

    def unsupported_fields(self, model: ModelConfig) -> list[str]:
        if self.kind == "derived" and model.head_dim * model.num_attention_heads != model.hidden_size:
            return [f"kv_channels = {model.kv_channels}"]
        if self.kind == "divides" and model.hidden_size % model.num_attention_heads:
            return [f"hidden_size = {model.hidden_size} with num_attention_heads = {model.num_attention_heads}"]
        return []


@dataclass(frozen=True)
class WholeHeads(ConfigRule):
    """The heads share the hidden size evenly; the class has no field for their width."""

    def hf_names(self) -> tuple[str, ...]:
        return ()

    def megatron_names(self) -> tuple[str, ...]:
        return ("kv_channels",)

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def unsupported_fields(self, model: ModelConfig) -> list[str]:
        uneven = model.head_dim * model.num_attention_heads != model.hidden_size
        return [f"kv_channels = {model.kv_channels}"] if uneven else []


@dataclass(frozen=True)
class Groups(ConfigRule):
    """Key/value heads; null means one for every query head."""

    default: int | None = None
    """How many a config.json means that does not name the field; None: one for every query head."""

    def hf_names(self) -> tuple[str, ...]:
        return ("num_key_value_heads",)

    def megatron_names(self) -> tuple[str, ...]:
        return ("num_query_groups",)

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {"num_key_value_heads": model.query_groups}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        groups = raw.get("num_key_value_heads", self.default)
        return {} if groups is None else {"num_query_groups": groups}


@dataclass(frozen=True)
class NoGroups(ConfigRule):
    """Every head has keys and values of its own; `hf` names a field that must say so, if the class has one."""

    hf: str | None = None
    default: int | None = None
    """What a config.json means that does not name the field; None: as many as heads."""

    def hf_names(self) -> tuple[str, ...]:
        return () if self.hf is None else (self.hf,)

    def megatron_names(self) -> tuple[str, ...]:
        return ("num_query_groups",)

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {} if self.hf is None else {self.hf: model.num_attention_heads}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        stated = None if self.hf is None else raw.get(self.hf, self.default)
        if stated is not None and stated != (heads := raw.get("num_attention_heads")):
            raise ConversionError(
                f"{self.hf} = {stated!r}, num_attention_heads = {heads!r}: every head of this class has keys and "
                "values of its own"
            )
        return {}

    def unsupported_fields(self, model: ModelConfig) -> list[str]:
        grouped = model.query_groups != model.num_attention_heads
        return [f"num_query_groups = {model.num_query_groups}"] if grouped else []


@dataclass(frozen=True)
class LatentAttention(ConfigRule):
    """Multi-head latent attention; a null `q_lora_rank` projects queries directly.

    The norms of latent vectors have an epsilon of 1e-6 in these classes, whatever `rms_norm_eps` says of the others:
    their code passes none (transformers' and DeepSeek's own; Moonlight has 1e-5 elsewhere).
    """

    epsilon: float = 1e-6

    def hf_names(self) -> tuple[str, ...]:
        return (*LATENT, "rms_norm_eps")

    def megatron_names(self) -> tuple[str, ...]:
        return ("multi_latent_attention", "layernorm_epsilon")

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        assert model.multi_latent_attention is not None
        fields = {hf: getattr(model.multi_latent_attention, megatron) for hf, megatron in LATENT.items()}
        return fields | {"rms_norm_eps": model.layernorm_epsilon}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        if absent := [name for name in LATENT if name not in raw]:
            raise ConversionError(f"{', '.join(absent)}: not given")
        latent = {megatron: raw[hf] for hf, megatron in LATENT.items()}
        epsilon = self.epsilon if raw.get("rms_norm_eps") is None else raw["rms_norm_eps"]
        if epsilon != self.epsilon:
            latent["latent_norm_epsilon"] = self.epsilon
        return {"multi_latent_attention": latent, "layernorm_epsilon": epsilon}

    def unsupported_fields(self, model: ModelConfig) -> list[str]:
        if model.multi_latent_attention is None:
            return ["multi_latent_attention = None"]
        epsilon = model.latent_norm_epsilon
        if epsilon == self.epsilon:
            return []
        name = (
            "multi_latent_attention.latent_norm_epsilon" if epsilon != model.layernorm_epsilon else "layernorm_epsilon"
        )
        return [f"{name} = {epsilon}"]
