"""Config rule of rotary position embedding: theta, scaling and partial rotation, in every spelling they have had."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ext.architectures.tables.fields import ConfigRule, said
from megatron_ext.architectures.tables.foreign_code import rope_fields
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConversionError

SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
        "mscale",
        "mscale_all_dim",
    ),
}
"""The fields of each `rope_type`; they have the same names in ModelConfig."""

_NESTED = ("rope_scaling", "rope_parameters")
# What is not written, as older readers do not know it; DeepSeek's factors are not there where they are 0.
_UNSAID = {"truncate": True}


@dataclass(frozen=True)
class _Stated:
    """What one nested mapping says."""

    scaling: dict[str, Any] | None
    theta: Any
    partial: Any


@dataclass(frozen=True)
class Rope(ConfigRule):
    """RoPE: transformers 5 keeps it all in `rope_parameters`, older readers look at the top and in `rope_scaling`.

    All of these are written. Readers differ in which place goes first, so places that differ are refused.
    """

    theta: float = 10000.0
    """Theta of a config.json that names none."""
    scalings: tuple[str, ...] = tuple(SCALINGS)
    """The `rope_type` that the class knows."""
    type_only: bool = False
    """Whether the class is older than `rope_type` and wants `rope_scaling` with `type` and `factor` and no more."""
    partial: float | None = 1.0
    """Share of the head that is rotated in a config.json that names none; None where the class rotates it all."""
    theta_name: str = "rope_theta"
    partial_name: str = "partial_rotary_factor"

    def hf_names(self) -> tuple[str, ...]:
        return (self.theta_name, self.partial_name, *_NESTED)

    def megatron_names(self) -> tuple[str, ...]:
        return ("rotary_base", "rope_scaling", *(("rotary_percent",) if self.partial is not None else ()))

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        top: dict[str, Any] = {self.theta_name: model.rotary_base}
        partial = {}
        if self.partial is not None and (model.rotary_percent != 1.0 or self.partial != 1.0):
            top[self.partial_name] = model.rotary_percent
            partial = {"partial_rotary_factor": model.rotary_percent}
        scaling: dict[str, Any] = {"rope_type": "default"}
        if model.rope_scaling is not None:
            fields = asdict(model.rope_scaling)
            scaling = {"rope_type": fields.pop("kind")}
            scaling |= {name: value for name, value in fields.items() if value != _UNSAID.get(name, 0.0)}
            # Readers before transformers 4.45 call it `type`.
            top["rope_scaling"] = {"type": scaling["rope_type"]} | scaling
            if self.type_only:
                del top["rope_scaling"]["rope_type"]
        return top | {"rope_parameters": {"rope_theta": model.rotary_base, **scaling, **partial}}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        found = {name: self._stated(name, raw) for name in _NESTED if raw.get(name)}
        scalings = [nested.scaling for nested in found.values()]
        if any(scaling != scalings[0] for scaling in scalings):
            raise ConversionError("rope_scaling and rope_parameters say different things; remove one of them")
        given = {self.theta_name: raw.get(self.theta_name)}
        theta = _one(given | {f"{name}.rope_theta": nested.theta for name, nested in found.items()})
        self._refuse_null_theta(raw, theta)
        theta = self.theta if theta is None else theta
        given = {self.partial_name: raw.get(self.partial_name)}
        partial = _one(given | {f"{name}.partial_rotary_factor": nested.partial for name, nested in found.items()})
        fields: dict[str, Any] = {"rotary_base": float(theta)}
        if scalings and scalings[0] is not None:
            fields["rope_scaling"] = scalings[0]
        return fields | self._rotated_share(partial)

    def unsupported_fields(self, model: ModelConfig) -> list[str]:
        kind = model.rope_scaling.kind if model.rope_scaling is not None else None
        return [] if kind is None or kind in self.scalings else [f"rope_scaling = {model.rope_scaling!r}"]

    def unread(self, raw: Mapping[str, Any]) -> list[str]:
        mappings = {name: raw[name] for name in _NESTED if isinstance(raw.get(name), dict)}
        return [
            said(f"{name}.{key}", value)
            for name, nested in mappings.items()
            for key, value in nested.items()
            if value is not None and self._nobody_reads(key)
        ]

    def _nobody_reads(self, key: str) -> bool:
        known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"} | {
            k for of in SCALINGS.values() for k in of
        }
        return key not in known and (self.type_only or key not in rope_fields())

    def _refuse_null_theta(self, raw: Mapping[str, Any], theta: Any) -> None:
        """Raise ConversionError where transformers' class takes a theta that is null: it then fails to compute."""
        nested = [
            name for name in _NESTED if isinstance(raw.get(name), dict) and raw[name].get("rope_theta", 0) is None
        ]
        null = [f"{name}.rope_theta" for name in nested]
        if theta is None and raw.get(self.theta_name, 0) is None:
            null.append(self.theta_name)
        if null:
            raise ConversionError(
                f"{null[0]} is null: no class of transformers computes anything with that; write the number that the "
                f"model was trained with, or remove the field where that is {self.theta:g}"
            )

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
        if nested.get("truncate", True) is None:
            raise ConversionError(f"{name}.truncate is null: write true or false, or remove it where that is true")
        named = {key: given.pop(key) for key in ("rope_type", "type") if key in given}
        for key, value in named.items():
            if not isinstance(value, str):
                raise ConversionError(f"{said(f'{name}.{key}', value)}: expected one of {', '.join(self.scalings)}")
        kinds = set(named.values())
        kind = kinds.pop() if kinds else "default"
        if kinds:
            raise ConversionError(f"{name} has another type than rope_type: {nested!r}; remove one of them")
        if kind not in self.scalings:
            raise ConversionError(
                f"{name}: rope_type = {kind!r}: this scaling of rotary embeddings is not supported here; there are "
                f"{', '.join(self.scalings)}"
            )
        theta, partial = given.pop("rope_theta", None), given.pop("partial_rotary_factor", None)
        unknown = {
            key: value for key, value in given.items() if key not in SCALINGS[kind] and not self._nobody_reads(key)
        }
        if unknown:
            listed = ", ".join(said(key, value) for key, value in unknown.items())
            raise ConversionError(f"{name}: {listed}: may change the model and is not understood with {kind!r}")
        if kind == "default":
            return _Stated(None, theta, partial)
        # transformers refuses these too: a guess would be another model.
        needed = SCALINGS[kind] if kind == "llama3" else ("factor",)
        if lacking := [key for key in needed if key not in given]:
            raise ConversionError(
                f"{name}: rope_type = {kind!r} without {', '.join(lacking)}; add what the model was trained with"
            )
        scaling = {key: given[key] for key in SCALINGS[kind] if key in given}
        if "original_max_position_embeddings" in SCALINGS[kind] and "max_position_embeddings" in raw:
            scaling.setdefault("original_max_position_embeddings", raw["max_position_embeddings"])
        return _Stated({"kind": kind, **scaling}, theta, partial)


def _one(places: Mapping[str, Any]) -> Any:
    """The number that is given in any of the places; None without one."""
    stated = {name: value for name, value in places.items() if value is not None}
    for name, value in stated.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConversionError(f"{said(name, value)}: expected a number")
    if len(set(stated.values())) > 1:
        listed = ", ".join(said(name, value) for name, value in stated.items())
        raise ConversionError(f"{listed}: readers differ in which they take; remove what is not meant")
    return next(iter(stated.values()), None)
