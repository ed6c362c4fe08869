"""Config rule of rotary position embedding: theta, scaling and partial rotation, in every spelling they have had."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ext.architectures.fields import ConfigRule
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConversionError

SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}
"""The fields of each `rope_type`; they have the same names in ModelConfig."""

_NESTED = ("rope_scaling", "rope_parameters")
# `truncate: true` is what YaRN means without it.
_NEUTRAL = {"truncate": True}


@dataclass(frozen=True)
class _Stated:
    """What one nested mapping says."""

    scaling: dict[str, Any] | None
    theta: Any
    partial: Any


@dataclass(frozen=True)
class Rope(ConfigRule):
    """RoPE: transformers 5 keeps it all in `rope_parameters`, older readers look at the top and in `rope_scaling`.

    All of these are written. Nested values go before those at the top, as in transformers.
    """

    theta: float = 10000.0
    """Theta of a config.json that names none."""
    scaling: bool = True
    """Whether the class knows scaled rotary embeddings."""
    partial: float | None = 1.0
    """Share of the head that is rotated in a config.json that names none; None where the class rotates it all."""
    theta_name: str = "rope_theta"
    partial_name: str = "partial_rotary_factor"

    def hf_names(self) -> tuple[str, ...]:
        return (self.theta_name, self.partial_name, *_NESTED)

    def megatron_names(self) -> tuple[str, ...]:
        scaling = ("rope_scaling",) if self.scaling else ()
        return ("rotary_base", *scaling, *(("rotary_percent",) if self.partial is not None else ()))

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        top: dict[str, Any] = {self.theta_name: model.rotary_base}
        partial = {}
        if self.partial is not None and (model.rotary_percent != 1.0 or self.partial != 1.0):
            top[self.partial_name] = model.rotary_percent
            partial = {"partial_rotary_factor": model.rotary_percent}
        scaling: dict[str, Any] = {"rope_type": "default"}
        if model.rope_scaling is not None and self.scaling:
            fields = asdict(model.rope_scaling)
            scaling = {"rope_type": fields.pop("kind")} | {name: value for name, value in fields.items() if value}
            # Readers before transformers 4.45 call it `type`.
            top["rope_scaling"] = {"type": scaling["rope_type"]} | scaling
        return top | {"rope_parameters": {"rope_theta": model.rotary_base, **scaling, **partial}}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        found = [self._stated(name, raw) for name in _NESTED if raw.get(name)]
        if len(found) == 2 and found[0].scaling != found[1].scaling:
            raise ConversionError("rope_scaling and rope_parameters say different things; remove one of them")
        theta, partial = raw.get(self.theta_name), raw.get(self.partial_name)
        for nested in found:
            theta = theta if nested.theta is None else nested.theta
            partial = partial if nested.partial is None else nested.partial
        theta = self.theta if theta is None else theta
        if isinstance(theta, bool) or not isinstance(theta, int | float):
            raise ConversionError(f"{self.theta_name} = {theta!r}: expected a number")
        fields: dict[str, Any] = {"rotary_base": float(theta)}
        if found and found[0].scaling is not None:
            fields["rope_scaling"] = found[0].scaling
        return fields | self._rotated_share(partial)

    def _rotated_share(self, partial: Any) -> dict[str, Any]:
        if self.partial is None:
            if partial not in (None, 1.0):
                raise ConversionError(f"{self.partial_name} = {partial!r}: this class rotates whole heads")
            return {}
        return {"rotary_percent": self.partial if partial is None else partial}

    def _stated(self, name: str, raw: Mapping[str, Any]) -> _Stated:
        nested = raw[name]
        if not isinstance(nested, dict):
            raise ConversionError(f"{name} = {nested!r}: expected a mapping")
        given = {key: value for key, value in nested.items() if value is not None}
        kinds = {given.pop(key) for key in ("rope_type", "type") if key in given}
        kind = kinds.pop() if kinds else "default"
        if kinds or kind not in SCALINGS or (kind != "default" and not self.scaling):
            raise ConversionError(f"{name}: rope_type = {kind!r}: this scaling of rotary embeddings is not supported")
        theta, partial = given.pop("rope_theta", None), given.pop("partial_rotary_factor", None)
        unknown = {k: v for k, v in given.items() if k not in SCALINGS[kind] and _NEUTRAL.get(k) != v}
        if unknown:
            listed = ", ".join(f"{key} = {value!r}" for key, value in unknown.items())
            raise ConversionError(f"{name}: {listed}: may change the model and is not understood with {kind!r}")
        if kind == "default":
            return _Stated(None, theta, partial)
        scaling = {key: given[key] for key in SCALINGS[kind] if key in given}
        if "original_max_position_embeddings" in SCALINGS[kind] and "max_position_embeddings" in raw:
            scaling.setdefault("original_max_position_embeddings", raw["max_position_embeddings"])
        return _Stated({"kind": kind, **scaling}, theta, partial)
