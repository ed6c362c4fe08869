"""Config rules of our own Hugging Face class, beyond those that architectures share (fields.py)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ext.architectures.tables.fields import ConfigRule, said
from megatron_ext.config import ModelConfig, to_mapping
from megatron_ext.errors import ConversionError

_LATENT = (
    ("q_lora_rank", "q_lora_rank"),
    ("kv_lora_rank", "kv_lora_rank"),
    ("qk_nope_head_dim", "qk_head_dim"),
    ("qk_rope_head_dim", "qk_pos_emb_head_dim"),
    ("v_head_dim", "v_head_dim"),
)


@dataclass(frozen=True)
class Spelled(ConfigRule):
    """A choice whose values have other names on either side."""

    hf: str
    megatron: str
    spelling: tuple[tuple[Any, Any], ...]
    """Pairs (Hugging Face, Megatron); the first is what an absent field means."""

    def hf_names(self) -> tuple[str, ...]:
        return (self.hf,)

    def megatron_names(self) -> tuple[str, ...]:
        return (self.megatron,)

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {self.hf: next(hf for hf, megatron in self.spelling if megatron == getattr(model, self.megatron))}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        stated = raw.get(self.hf, self.spelling[0][0])
        for hf, megatron in self.spelling:
            if hf == stated:
                return {self.megatron: megatron}
        allowed = ", ".join(repr(hf) for hf, _ in self.spelling)
        raise ConversionError(f"{self.hf} = {stated!r}: expected one of {allowed}")


@dataclass(frozen=True)
class Experts(ConfigRule):
    """How many routed experts there are; 0 in a dense model, for serving engines that count."""

    def hf_names(self) -> tuple[str, ...]:
        return ("num_experts",)

    def megatron_names(self) -> tuple[str, ...]:
        return ("num_moe_experts",)

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {"num_experts": model.num_moe_experts or 0}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_moe_experts": raw.get("num_experts") or None}


@dataclass(frozen=True)
class SelectedSum(ConfigRule):
    """Whether the selected scores are divided by their sum; null where a softmax over them does that already."""

    def hf_names(self) -> tuple[str, ...]:
        return ("norm_topk_prob",)

    def megatron_names(self) -> tuple[str, ...]:
        return ("moe_router_norm_topk_prob",)

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        softmax_of_selected = model.moe_router_score_function == "softmax" and not model.moe_router_pre_softmax
        return {"norm_topk_prob": None if softmax_of_selected or not model.is_moe else model.normalizes_topk}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        stated = raw.get("norm_topk_prob")
        usual = raw.get("scoring_func") == "sigmoid" and raw.get("num_experts_per_tok") != 1
        return {"moe_router_norm_topk_prob": None if stated in (None, usual) else stated}


@dataclass(frozen=True)
class Heads(ConfigRule):
    """Widths of attention heads and, in latent attention, of the latent vectors (DeepSeek's names)."""

    def hf_names(self) -> tuple[str, ...]:
        return ("head_dim", "num_key_value_heads", *(hf for hf, _ in _LATENT))

    def megatron_names(self) -> tuple[str, ...]:
        return ("kv_channels", "num_query_groups", "multi_latent_attention")

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        latent = model.multi_latent_attention
        widths = {hf: None if latent is None else getattr(latent, megatron) for hf, megatron in _LATENT}
        return {"head_dim": model.head_dim, "num_key_value_heads": model.query_groups, **widths}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        stated = {megatron: raw[hf] for hf, megatron in _LATENT if raw.get(hf) is not None}
        head, groups = raw.get("head_dim"), raw.get("num_key_value_heads")
        if not stated:
            return {"kv_channels": head, "num_query_groups": groups}
        nope, rope = raw.get("qk_nope_head_dim"), raw.get("qk_rope_head_dim")
        if head is not None and isinstance(nope, int) and isinstance(rope, int) and head != nope + rope:
            raise ConversionError(f"head_dim = {head!r}: qk_nope_head_dim + qk_rope_head_dim is {nope + rope}")
        if groups not in (None, raw.get("num_attention_heads")):
            raise ConversionError(
                f"num_key_value_heads = {groups!r}: in latent attention "
                f"({', '.join(said(hf, raw[hf]) for hf, _ in _LATENT if raw.get(hf) is not None)}) every head has keys "
                "and values of its own"
            )
        return {"multi_latent_attention": stated}

    def unsupported_fields(self, model: ModelConfig) -> list[str]:
        epsilon = model.latent_norm_epsilon
        return [f"latent_norm_epsilon = {epsilon}"] if epsilon != model.layernorm_epsilon else []


@dataclass(frozen=True)
class Noise(ConfigRule):
    """Noisy gating, as one nested mapping on both sides."""

    def hf_names(self) -> tuple[str, ...]:
        return ("router_noise",)

    def megatron_names(self) -> tuple[str, ...]:
        return ("moe_router_noise",)

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {"router_noise": to_mapping(model)["moe_router_noise"]}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        return {"moe_router_noise": raw.get("router_noise")}


@dataclass(frozen=True)
class Training(ConfigRule):
    """What only further training reads, under Megatron's names in one nested mapping, so that it comes back."""

    hf: str
    megatron: tuple[str, ...]

    def hf_names(self) -> tuple[str, ...]:
        return (self.hf,)

    def megatron_names(self) -> tuple[str, ...]:
        return self.megatron

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        fields = to_mapping(model)
        return {self.hf: {name: fields[name] for name in self.megatron}}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        stated = raw.get(self.hf) or {}
        if not isinstance(stated, dict):
            raise ConversionError(f"{self.hf} = {stated!r}: expected a mapping")
        if unknown := sorted(set(stated) - set(self.megatron)):
            raise ConversionError(f"{self.hf}: {', '.join(unknown)}: not understood")
        return dict(stated)
