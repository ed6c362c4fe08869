"""Depth up-scaling: a deeper model made of the layers of a shallower one, some of them more than once.

Kim et al. 2023 (SOLAR 10.7B, arXiv 2312.15166), section 2: layers 0-23 and then 8-31 of a model of 32.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron_ext.checkpoint.streams import TensorSource, TensorSpec
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConfigError

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")


def parse_layers(text: str, num_layers: int) -> list[int]:
    """The layers that `0-23,8-31` means, in order; both ends of a range are part of it.

    Raises:
        ConfigError: not a list of layers or ranges of a model of `num_layers`.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= num_layers:
            raise ConfigError(
                f"layers = {text!r}: {part.strip()!r} is no layer or range of layers of a model with {num_layers}, "
                f"counted from 0; for example 0-{num_layers - 1}"
            )
        layers += range(first, last + 1)
    return layers


def deepened_model(model: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """The configuration of the model whose layers are `layers` of `model`."""
    kinds: dict[str, Any] = {}
    if model.is_moe:
        kinds |= {"moe_layer_freq": [int(model.moe_layer_pattern[layer]) for layer in layers], "moe_first_k_dense": 0}
    if model.window_attn_skip_freq is not None:
        kinds["window_attn_skip_freq"] = [int(model.window_layer_pattern[layer]) for layer in layers]
    return replace(model, num_layers=len(layers), **kinds)


class RepeatedLayers:
    """A source whose layer i is layer `layers[i]` of another."""

    def __init__(self, source: TensorSource, layers: Sequence[int]) -> None:
        self._source = source
        self._names: dict[str, str] = {}
        for name in source.specs:
            match = _LAYER.fullmatch(name)
            if match is None:
                self._names[name] = name
                continue
            for target, layer in enumerate(layers):
                if layer == int(match[1]):
                    self._names[f"decoder.layers.{target}.{match[2]}"] = name
        self.specs: Mapping[str, TensorSpec] = {name: source.specs[origin] for name, origin in self._names.items()}

    def read(self, name: str) -> Tensor:
        """One whole tensor of the deeper model."""
        return self._source.read(self._names[name])
