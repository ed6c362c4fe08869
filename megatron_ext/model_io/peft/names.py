"""Which Hugging Face module each adapter is beside, and which layers of a class have their experts in one tensor."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.rules import BlockQkv, Rule, Transpose
from megatron_ext.canonical.adapters import AdapterPair
from megatron_ext.config import ModelConfig
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

    def modules(self, pair: AdapterPair) -> list[str]:
        """The module whose weight `pair` adds to, such as `model.layers.0.self_attn.q_proj`.

        The newest name comes last: transformers 5 calls GPT-NeoX's `embed_out` `lm_head`.
        """
        rule, holes = self._rules[pair.weight]
        names = rule.hf_names()
        own = names.get(pair.projection, names.get("tensor", ""))
        found = [own, *(alias.other for alias in self._architecture.aliases if alias.hf == own)]
        return [name.format(**holes).removesuffix(".weight") for name in found]

    def module(self, pair: AdapterPair) -> str:
        """Its newest name."""
        return self.modules(pair)[-1]

    def fused(self, pair: AdapterPair) -> Rule | None:
        """What the weight is made by, where its module has queries, keys and values together."""
        rule, _ = self._rules[pair.weight]
        is_qkv = pair.weight.endswith("linear_qkv.weight")  # latent attention's queries are none of three
        return rule if is_qkv and "tensor" in rule.hf_names() else None

    @property
    def are_transposed(self) -> bool:
        """Whether the class has weights stored [inputs, outputs]."""
        of_modules = (rule for rule, _ in self._rules.values() if "{expert}" not in rule.megatron)
        return any(isinstance(rule, Transpose | BlockQkv) for rule in of_modules)

    @property
    def hides_experts(self) -> bool:
        """Whether experts are in tensors that no adapter of gate, up or down alone is written for (gpt-oss)."""
        return any(stacked.written for stacked in self._architecture.stacked)

    def experts(self) -> Mapping[int, Experts]:
        """The routed experts of each layer, where the class keeps them in one; empty where each is a module."""
        if not self._architecture.stacked or self.hides_experts:
            return {}
        gate_up, down = (stacked.hf for stacked in self._architecture.stacked)
        module = gate_up.rpartition(".")[0]
        parameters = gate_up.rpartition(".")[2], down.rpartition(".")[2]
        pattern = self._model.moe_layer_pattern
        return {n: Experts(module.format(layer=n), *parameters) for n, is_moe in enumerate(pattern) if is_moe}
