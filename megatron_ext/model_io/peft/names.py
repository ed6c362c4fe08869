"""Which Hugging Face module each adapter is beside, and which layers of a class have their experts in one tensor."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.rules import GateUp, Qkv, Rename
from megatron_ext.canonical.adapters import AdapterPair
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConversionError
from megatron_ext.model_io.engine import expanded

FEED_FORWARD = ("gate", "up", "down")
"""Projections that PEFT takes for experts' wherever they are, in classes that keep experts in one tensor."""


@dataclass(frozen=True)
class Experts:
    """The module of one layer's routed experts where a class keeps them in tensors of all experts."""

    module: str
    gate_up: str
    """The parameter with gate and up, [experts, 2 widths, hidden]."""
    down: str
    """The parameter [experts, hidden, width]."""


class HuggingFaceNames:
    """The modules of a Hugging Face class for the projections of a model."""

    def __init__(self, architecture: Architecture, model: ModelConfig) -> None:
        self._architecture, self._model = architecture, model
        self._rules = {
            rule.megatron.format(**holes): (rule, holes) for rule, holes in expanded(architecture.weights, model)
        }

    def module(self, pair: AdapterPair) -> str:
        """The module whose weight `pair` adds to, such as `model.layers.0.self_attn.q_proj`.

        Raises:
            ConversionError: the class has no such module of its own.
        """
        if (module := self.module_or_none(pair)) is None:
            raise ConversionError(
                f"{self._architecture.hf_class} has no linear layer of its own for {pair.projection} of "
                f"{pair.weight}, so PEFT can have no adapter there; merge the adapters instead (tools/merge_lora.py)"
            )
        return module

    def module_or_none(self, pair: AdapterPair) -> str | None:
        """The same, None where there is none."""
        rule, holes = self._rules[pair.weight]
        names = rule.hf_names()
        if isinstance(rule, Qkv | GateUp):
            name = names[pair.projection]
        elif isinstance(rule, Rename):
            name = names["tensor"]
        else:
            return None
        return name.format(**holes).removesuffix(".weight")

    def experts(self) -> Mapping[int, Experts]:
        """The routed experts of each layer, where the class keeps them in one; empty where each is a module."""
        if not self._architecture.stacked:
            return {}
        gate_up, down = (stacked.hf for stacked in self._architecture.stacked)
        module = gate_up.rpartition(".")[0]
        parameters = gate_up.rpartition(".")[2], down.rpartition(".")[2]
        pattern = self._model.moe_layer_pattern
        return {n: Experts(module.format(layer=n), *parameters) for n, is_moe in enumerate(pattern) if is_moe}
