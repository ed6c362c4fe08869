"""Config rules: which fields of a Hugging Face config.json correspond to which of ModelConfig.

A table of these is read in both directions. A Hugging Face field that no rule mentions is refused by name where the
code of the class may read it (base.py): a silent default would change the model.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

from megatron_ext.config import ModelConfig, load_config
from megatron_ext.config.base import fields_of
from megatron_ext.config.model_fields import OUTSIDE_LOGITS, is_training_only
from megatron_ext.errors import ConfigError, ConversionError

HARMLESS = frozenset(
    "architectures auto_map bos_token_id dtype eos_token_id initializer_range keys_to_ignore_at_inference model_type "
    "output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp return_dict "
    "router_aux_loss_coef tokenizer_class torch_dtype transformers_version use_cache is_encoder_decoder id2label "
    "label2id problem_type chunk_size_feed_forward router_jitter_noise aux_loss_alpha seq_aux ep_size "
    # Read for initialisation, for memory in training, for a warning, and for heads of other tasks.
    "initializer_factor init_std gradient_checkpointing sep_token_id classifier_dropout "
    "token_classification_bias".split()
)
"""Fields that classes read, or older ones did, and that do not change the logits of a forward pass."""

TRAINING_OF_OTHERS = {
    "router_aux_loss_coef": "this is top-k times a balance loss of all layers together, Megatron's is of each layer; "
    "set model.moe_aux_loss_coeff to train on with one",
    "aux_loss_alpha": "no code of this class says of which balance loss; set model.moe_router_load_balancing_type and "
    "model.moe_aux_loss_coeff to train on with one",
    "router_jitter_noise": "this is noise on the experts' input too, Megatron's is on the router's alone; set "
    "model.moe_router_noise to train on with it",
}
"""Harmless fields that training reads and Megatron has no exact counterpart of: why, and what to set instead."""

QUANTIZED = ("quantization_config", "quantization", "compression_config")
"""Fields that mark quantized weights, whoever reads them."""
UNKNOWN = {
    **dict.fromkeys(
        QUANTIZED,
        "the weights are quantized: take the original ones, or dequantize them (transformers' `from_pretrained(..., "
        "quantization_config=...(dequantize=True))` and `save_pretrained`, or the authors' script)",
    ),
    "sliding_window": "this class has no window here; take it out if sequences are no longer than it",
    "layer_types": "this class has the same attention in every layer here; take it out if that is so",
}
"""The way out of single fields that no table knows."""
MOST = {"num_layers": 2_000, "num_moe_experts": 5_000}
"""Numbers above which nothing is looked at further: each of them has tensors, whose names would fill the memory."""
_NOT_SO = "no class reads that here; write the number, list or name that the model was published with"
WAY_OUT = (
    "  What does not change this model can be taken out of a copy of its config.json; what does needs a field in its "
    "table (CONTRIBUTING.md, Add an architecture)."
)
"""The last line of each refusal."""


@dataclass(frozen=True)
class ConfigRule(ABC):
    """One correspondence between fields of both configurations."""

    @abstractmethod
    def hf_names(self) -> tuple[str, ...]:
        """The Hugging Face fields this rule accounts for."""

    @abstractmethod
    def megatron_names(self) -> tuple[str, ...]:
        """The ModelConfig fields whose every value this rule carries over."""

    @abstractmethod
    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        """The Hugging Face fields of `model`."""

    @abstractmethod
    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The ModelConfig fields that `raw` says. Raises ConversionError where the model cannot be expressed."""

    def unsupported_fields(self, model: ModelConfig) -> list[str]:
        """The values of `model`, each as `field = value`, that this rule's Hugging Face fields cannot say."""
        return []

    def unread(self, raw: Mapping[str, Any]) -> list[str]:
        """What is inside this rule's Hugging Face fields, each as `field = value`, and read by no code of the class."""
        return []


@dataclass(frozen=True)
class Field(ConfigRule):
    """The same value under both names. `megatron` may be a property of ModelConfig when `settable` names the field."""

    hf: str
    megatron: str
    settable: str | None = None
    default: Any = None
    """What Hugging Face means where the field is absent or null."""
    also: tuple[str, ...] = ()
    """Further names of the same field: any is read, all are written."""
    required: bool = False
    """Refuse a config.json without it, because neither side's default is meant."""

    def hf_names(self) -> tuple[str, ...]:
        return (self.hf, *self.also)

    def megatron_names(self) -> tuple[str, ...]:
        return (self.settable or self.megatron,)

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return dict.fromkeys(self.hf_names(), getattr(model, self.megatron))

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        stated = {name: raw[name] for name in self.hf_names() if raw.get(name) is not None}
        values = list(stated.values())
        if any(value != values[0] for value in values):
            raise ConversionError(f"{_listed(stated)}: names of one field, with different values")
        if not values and self.required:
            raise ConversionError(f"{self.hf}: is not given")
        value = values[0] if values else self.default
        return {} if value is None else {self.settable or self.megatron: value}


@dataclass(frozen=True)
class Inverted(ConfigRule):
    """A flag that means the opposite in Megatron."""

    hf: str
    megatron: str
    default: bool = False

    def hf_names(self) -> tuple[str, ...]:
        return (self.hf,)

    def megatron_names(self) -> tuple[str, ...]:
        return (self.megatron,)

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {self.hf: not getattr(model, self.megatron)}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        return {self.megatron: not raw.get(self.hf, self.default)}


@dataclass(frozen=True)
class Fixed(ConfigRule):
    """A field for which only one value can be expressed."""

    hf: str
    value: Any
    also: tuple[Any, ...] = field(default=(None,))
    """Other spellings of the same meaning; absent counts as None."""

    def hf_names(self) -> tuple[str, ...]:
        return (self.hf,)

    def megatron_names(self) -> tuple[str, ...]:
        return ()

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {self.hf: self.value}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        if (stated := raw.get(self.hf)) not in (self.value, *self.also):
            raise ConversionError(f"{self.hf} = {stated!r}: only {self.value!r} can be expressed in Megatron here")
        return {}


@dataclass(frozen=True)
class Always(ConfigRule):
    """A field of ModelConfig that has one value in every model of the class, and no Hugging Face field."""

    megatron: str
    value: Any

    def hf_names(self) -> tuple[str, ...]:
        return ()

    def megatron_names(self) -> tuple[str, ...]:
        return (self.megatron,)

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        return {self.megatron: _plain(self.value)}

    def unsupported_fields(self, model: ModelConfig) -> list[str]:
        value = getattr(model, self.megatron)
        return [] if value == self.value else [f"{self.megatron} = {value!r}"]


@dataclass(frozen=True)
class Ignored(ConfigRule):
    """Hugging Face fields that leave the logits of this class alone, or that it computes anew from others."""

    hf: tuple[str, ...]
    writes: tuple[tuple[str, Any], ...] = ()
    """Values that an export says all the same."""

    def hf_names(self) -> tuple[str, ...]:
        return self.hf

    def megatron_names(self) -> tuple[str, ...]:
        return ()

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return dict(self.writes)

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Normalization(ConfigRule):
    """Gating-logit normalization, as one nested mapping on both sides."""

    hf: str

    def hf_names(self) -> tuple[str, ...]:
        return (self.hf,)

    def megatron_names(self) -> tuple[str, ...]:
        return ("moe_gating_normalization",)

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        n = model.moe_gating_normalization
        return {self.hf: None if n is None else {"scale": n.scale, "eps": n.eps, "correction": n.correction}}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        stated = raw.get(self.hf)
        return {"moe_gating_normalization": stated}


@dataclass(frozen=True)
class LayerPattern(ConfigRule):
    """Which layers are MoE: a list of 0 and 1, null in a dense model."""

    hf: str

    def hf_names(self) -> tuple[str, ...]:
        return (self.hf,)

    def megatron_names(self) -> tuple[str, ...]:
        return ("moe_layer_freq", "moe_first_k_dense")

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {self.hf: [int(is_moe) for is_moe in model.moe_layer_pattern] if model.is_moe else None}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        stated = raw.get(self.hf)
        if stated is not None:
            require_list(self.hf, stated, "with one entry a layer")
        return {} if stated is None else {"moe_layer_freq": stated}


def unsaid(rules: tuple[ConfigRule, ...], model: ModelConfig) -> list[str]:
    """What a table would lose of `model`: values it cannot say, and fields it lacks that are not at their default."""
    # Overrides are judged by registry.py, whatever the class.
    carried = {name for rule in rules for name in rule.megatron_names()} | OUTSIDE_LOGITS | {"transformer_overrides"}
    carried |= {name for name in fields_of(ModelConfig) if is_training_only(getattr(model, name))}
    if model.position_embedding_type != "rope":
        carried |= {"rotary_base"}  # nothing is rotated
    if model.moe_router_topk_scaling_factor == 1.0:
        carried |= {"moe_router_topk_scaling_factor"}
    lost = [statement for rule in rules for statement in rule.unsupported_fields(model)]
    return lost + [
        f"{name} = {getattr(model, name)!r}"
        for name, info in fields_of(ModelConfig).items()
        if name not in carried and getattr(model, name) != info.get_default(call_default_factory=True)
    ]


def fields_outside(rules: tuple[ConfigRule, ...]) -> tuple[str, ...]:
    """The ModelConfig fields without a part in the logits that no rule of a table carries."""
    carried = {name for rule in rules for name in rule.megatron_names()}
    return tuple(name for name in fields_of(ModelConfig) if name in OUTSIDE_LOGITS - carried)


def config_to_hf(rules: tuple[ConfigRule, ...], model: ModelConfig) -> dict[str, Any]:
    """The Hugging Face fields of `model` under a table of rules."""
    result: dict[str, Any] = {}
    for rule in rules:
        result.update(rule.to_hf(model))
    return result


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def said(name: str, value: Any) -> str:
    """A field and its value, cut where it is long."""
    text = repr(value)
    return f"{name} = {text if len(text) <= 200 else f'{text[:200]}...'}"


def require_list(name: str, value: Any, of_what: str) -> None:
    """Raise ConversionError where the value of a field is no list; `of_what` says what it has to hold."""
    if not isinstance(value, list):
        raise ConversionError(f"{said(name, value)}: expected a list {of_what}")


def says_nothing(name: str, value: Any) -> bool:
    """Whether a field that shared code of all classes reads has the value that is meant without it."""
    return (name == "is_causal" and value is True) or (
        name == "layer_types" and isinstance(value, list) and set(map(str, value)) == {"full_attention"}
    )


def unknown_fields(rules: tuple[ConfigRule, ...], raw: Mapping[str, Any]) -> list[str]:
    """The fields of a Hugging Face config that say something, that no rule knows and that not every class may have.

    What is null says nothing, and what begins with `_` is a note of the program that wrote it.
    """
    known = {name for rule in rules for name in rule.hf_names()} | HARMLESS
    return [name for name in raw if name not in known and raw[name] is not None and not name.startswith("_")]


def config_to_megatron(rules: tuple[ConfigRule, ...], raw: Mapping[str, Any], *, source: str) -> ModelConfig:
    """The ModelConfig that a Hugging Face config means.

    Raises:
        ConversionError: listing every field that no rule knows and every value that cannot be expressed.
    """
    faults = [
        f"{said(name, raw[name])}: may change the model and is not understood"
        + (f"; {UNKNOWN[name]}" if name in UNKNOWN else "")
        for name in unknown_fields(rules, raw)
    ]
    faults += (beyond := [fault for rule in rules for fault in _beyond_reason(rule, raw)])
    fields: dict[str, Any] = {}
    for rule in rules if not beyond else ():
        try:
            fields.update(rule.to_megatron(raw))
        except ConversionError as error:
            faults.append(str(error))
        except (TypeError, ValueError, ArithmeticError):  # of a rule that computes with what it is given
            stated = {name: raw[name] for name in rule.hf_names() if name in raw}
            faults.append(f"{_listed(stated)}: {_NOT_SO}")
    if not faults:
        try:
            return load_config(ModelConfig, fields, source=source)
        except ConfigError as error:
            faults = [_in_both_tongues(line.strip(), rules, raw) for line in str(error).splitlines()[1:]]
    listed = "\n".join(f"  {fault if len(fault) <= 1000 else f'{fault[:500]} ... {fault[-400:]}'}" for fault in faults)
    raise ConversionError(f"{source}:\n{listed}\n{WAY_OUT}")


def _in_both_tongues(fault: str, rules: tuple[ConfigRule, ...], raw: Mapping[str, Any]) -> str:
    """A fault of a Megatron model, with the Hugging Face fields that its values come from."""
    named = set(re.findall(r"\bmodel\.(\w+)", fault))
    if named & {"head_dim", "rotary_width"}:
        named |= {"kv_channels", "hidden_size", "num_attention_heads"}  # which these two follow from
    if named & {"moe_first_k_dense", "moe_layer_freq"}:
        named.add("num_layers")
    statements = []
    for rule in rules:
        if any(megatron in rule.megatron_names() for megatron in named):
            given = [name for name in rule.hf_names() if raw.get(name) is not None]
            absent = [name for name in rule.hf_names() if name not in given and ("None" in fault or not given)]
            statements += [said(name, raw[name]) for name in given] + [f"{name} is not given" for name in absent]
    return f"{fault} ({', '.join(statements)})" if statements else fault


def _beyond_reason(rule: ConfigRule, raw: Mapping[str, Any]) -> list[str]:
    most = max((MOST[name] for name in rule.megatron_names() if name in MOST), default=None)
    return [
        f"{said(name, raw[name])}: more than {most:,}, which no model has"
        for name in rule.hf_names()
        if most is not None and isinstance(raw.get(name), int | float) and raw[name] > most
    ]


def left_behind(rules: tuple[ConfigRule, ...], raw: Mapping[str, Any]) -> list[str]:
    """What a Hugging Face config says about training, and a table of rules does not keep; zero says nothing."""
    kept = {name for rule in rules for name in rule.hf_names()}
    return [
        f"{said(name, raw[name])} is not carried over: {why}"
        for name, why in TRAINING_OF_OTHERS.items()
        if name not in kept and raw.get(name)
    ]


def _listed(stated: Mapping[str, Any]) -> str:
    return ", ".join(said(name, value) for name, value in stated.items())
