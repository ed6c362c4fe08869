"""Config rules of sliding windows: how many positions a query attends to, and in which layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.architectures.tables.fields import ConfigRule, require_list, said
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConversionError

FULL, SLIDING = "full_attention", "sliding_attention"
OF_TYPES = f"with {FULL} or {SLIDING} for each layer"
"""What `layer_types` has to be."""
NAMES = ("sliding_window", "window_attn_skip_freq")


def layer_types(model: ModelConfig) -> list[str]:
    """What each layer of `model` attends to, in transformers' words."""
    return [SLIDING if has_window else FULL for has_window in model.window_layer_pattern]


def window_of(window: int | None, types: Sequence[str]) -> dict[str, Any]:
    """The ModelConfig fields of a window in those layers that `types` says.

    Raises:
        ConversionError: layers attend to something else, or have a window that is not given.
    """
    allowed = {FULL} if window is None else {FULL, SLIDING}
    if foreign := sorted(set(map(str, types)) - allowed):
        without = " without a window (sliding_window)" if foreign == [SLIDING] else ""
        raise ConversionError(f"layer_types names {', '.join(foreign)}{without}: that cannot be expressed in Megatron")
    if SLIDING not in types:
        return {}
    return {"sliding_window": window, "window_attn_skip_freq": skip_frequency([kind == SLIDING for kind in types])}


def skip_frequency(pattern: list[bool]) -> int | list[int] | None:
    """`window_attn_skip_freq` of a model whose layers have the window as `pattern` says, as short as it can be said."""
    if all(pattern):
        return None
    every = pattern.index(False) + 1
    if every > 1 and pattern == [layer % every != 0 for layer in range(1, len(pattern) + 1)]:
        return every
    return [int(has_window) for has_window in pattern]


@dataclass(frozen=True)
class LayerWindows(ConfigRule):
    """A window in those layers whose entry of `layer_types` says so; in all where that is absent."""

    def hf_names(self) -> tuple[str, ...]:
        return ("sliding_window", "layer_types")

    def megatron_names(self) -> tuple[str, ...]:
        return NAMES

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        if not any(model.window_layer_pattern):
            return dict.fromkeys(self.hf_names())
        return {"sliding_window": model.sliding_window, "layer_types": layer_types(model)}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        window, types = raw.get("sliding_window"), raw.get("layer_types")
        if types is None:
            return {"sliding_window": window}
        require_list("layer_types", types, OF_TYPES)
        return window_of(window, types)


def every_layer(raw: Mapping[str, Any], layer: int) -> bool:
    """All have the window: Mistral and those after it."""
    return True


def after_the_first(raw: Mapping[str, Any], layer: int) -> bool:
    """The first `max_window_layers` have none: Qwen2 and Qwen3."""
    first = raw.get("max_window_layers")
    return bool(layer >= (28 if first is None else first))


@dataclass(frozen=True)
class SlidingWindow(ConfigRule):
    """A window of a stock class. It stands in the model also where no sequence is longer than it."""

    window: int | None = None
    """What absent means."""
    switch: str | None = None
    """The field that turns it on, in classes that have one; they have `max_window_layers` too."""
    layers: Callable[[Mapping[str, Any], int], bool] | None = every_layer
    """Which layers have it where `layer_types` does not say so; None: versions of transformers differ about it."""
    reads_types: bool = False
    """Whether the class reads `layer_types`. Elsewhere it must agree, as AutoModel reads it of Mistral too."""

    def hf_names(self) -> tuple[str, ...]:
        return ("sliding_window", "layer_types", *((self.switch, "max_window_layers") if self.switch else ()))

    def megatron_names(self) -> tuple[str, ...]:
        return NAMES

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        if not any(pattern := model.window_layer_pattern):
            return {"sliding_window": None} | ({self.switch: False} if self.switch else {})
        fields: dict[str, Any] = {"sliding_window": model.sliding_window} | ({self.switch: True} if self.switch else {})
        if self.reads_types:
            fields |= {"layer_types": layer_types(model), "max_window_layers": pattern.index(True)}
        return fields

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        is_on = not self.switch or raw.get(self.switch, False)
        window = raw.get("sliding_window", self.window) if is_on else None
        types, count = raw.get("layer_types"), raw.get("num_hidden_layers")
        if not isinstance(count, int):
            return {}  # what is wrong is said of that one
        if types is None and window is not None and self.layers is None:
            raise ConversionError(
                f"{self.switch} = True, {said('sliding_window', window)}: versions of transformers differ about which "
                f"layers of this class have it; say in layer_types which were trained so ({SLIDING}, {FULL})"
            )
        if types is not None:
            require_list("layer_types", types, OF_TYPES)
        has_window = self.layers if window is not None else None
        usual = [SLIDING if has_window and has_window(raw, layer) else FULL for layer in range(count)]
        if types is not None and not self.reads_types and types != usual:
            raise ConversionError(f"{said('layer_types', types)}: this class has the same attention in every layer")
        if types is not None and len(types) != count:
            raise ConversionError(f"{said('layer_types', types)}: needs one entry for each of {count} layers")
        return window_of(window, usual if types is None else types)

    def unsupported_fields(self, model: ModelConfig) -> list[str]:
        pattern = model.window_layer_pattern
        mixed = any(pattern) and not all(pattern)
        return [said("window_attn_skip_freq", model.window_attn_skip_freq)] if mixed and not self.reads_types else []
