"""Weight rules: which tensors of a Hugging Face model and of Megatron correspond, and how one becomes the other.

A rule works on full tensors and knows both directions, each the other's inverse; whoever applies it chooses. Names
have the holes `{layer}` and `{expert}`, filled from the model's configuration, so the exact set of names is known.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from megatron_ext.config import ModelConfig

Parts = dict[str, Tensor]
Where = Callable[[ModelConfig, int], bool]


def everywhere(model: ModelConfig, layer: int) -> bool:
    """Every layer."""
    return True


def in_dense_layers(model: ModelConfig, layer: int) -> bool:
    """Layers without experts."""
    return not model.moe_layer_pattern[layer]


def in_moe_layers(model: ModelConfig, layer: int) -> bool:
    """Layers with experts."""
    return model.moe_layer_pattern[layer]


def with_shared_experts(model: ModelConfig, layer: int) -> bool:
    """MoE layers of a model that has shared experts."""
    return model.moe_layer_pattern[layer] and model.moe_shared_expert_intermediate_size is not None


def untied(model: ModelConfig, layer: int) -> bool:
    """Models whose output layer has weights of its own."""
    return model.untie_embeddings_and_output_weights


def with_biases(model: ModelConfig, layer: int) -> bool:
    """Models with biases in every linear layer."""
    return model.add_bias_linear


def with_qkv_biases(model: ModelConfig, layer: int) -> bool:
    """Models with biases in the query, key and value projections."""
    return model.has_qkv_bias


@dataclass(frozen=True)
class Rule(ABC):
    """One correspondence. `megatron` is a canonical name; `where` says in which layers the rule holds."""

    megatron: str
    where: Where = everywhere
    dtype: torch.dtype | None = None
    """What the tensor is in every checkpoint, whatever dtype the others are converted to; None: it follows them."""

    @abstractmethod
    def hf_names(self) -> dict[str, str]:
        """Hugging Face names by the role each tensor plays in the rule."""

    @abstractmethod
    def to_megatron(self, parts: Parts, model: ModelConfig) -> Tensor:
        """The Megatron tensor made of the Hugging Face tensors `parts`."""

    @abstractmethod
    def to_hf(self, tensor: Tensor, model: ModelConfig) -> Parts:
        """The Hugging Face tensors that the Megatron `tensor` holds."""

    def holes(self, model: ModelConfig) -> Iterator[dict[str, int]]:
        """Every way to fill the holes of the names for `model`."""
        if "{layer}" not in self.megatron:
            if self.where(model, 0):
                yield {}
            return
        experts = range(model.num_moe_experts or 0) if "{expert}" in self.megatron else (None,)
        for layer in range(model.num_layers):
            if self.where(model, layer):
                for expert in experts:
                    yield {"layer": layer} if expert is None else {"layer": layer, "expert": expert}


@dataclass(frozen=True)
class Rename(Rule):
    """The same tensor under another name. With `vocab` its rows are the vocabulary, padded in Megatron only."""

    hf: str = ""
    vocab: bool = False

    def hf_names(self) -> dict[str, str]:
        return {"tensor": self.hf}

    def to_megatron(self, parts: Parts, model: ModelConfig) -> Tensor:
        tensor = parts["tensor"]
        rows = model.padded_vocab_size - tensor.shape[0] if self.vocab else 0
        if rows == 0:
            return tensor
        padding = tensor.new_zeros((rows, *tensor.shape[1:]))
        return torch.cat((tensor, padding))

    def to_hf(self, tensor: Tensor, model: ModelConfig) -> Parts:
        return {"tensor": tensor[: model.vocab_size] if self.vocab else tensor}


@dataclass(frozen=True)
class Transpose(Rule):
    """A weight stored [inputs, outputs], as GPT-2's `Conv1D` has it. Biases are left as they are."""

    hf: str = ""

    def hf_names(self) -> dict[str, str]:
        return {"tensor": self.hf}

    def to_megatron(self, parts: Parts, model: ModelConfig) -> Tensor:
        return parts["tensor"].t().contiguous()

    def to_hf(self, tensor: Tensor, model: ModelConfig) -> Parts:
        return {"tensor": tensor.t().contiguous()}


@dataclass(frozen=True)
class Qkv(Rule):
    """Query, key and value projections against Megatron's single one.

    Megatron interleaves them by key/value group: for each group its query heads, its key head, its value head.
    """

    q: str = ""
    k: str = ""
    v: str = ""

    def hf_names(self) -> dict[str, str]:
        return {"q": self.q, "k": self.k, "v": self.v}

    def to_megatron(self, parts: Parts, model: ModelConfig) -> Tensor:
        groups = [parts[role].unflatten(0, (model.query_groups, -1)) for role in ("q", "k", "v")]
        return torch.cat(groups, dim=1).flatten(0, 1)

    def to_hf(self, tensor: Tensor, model: ModelConfig) -> Parts:
        head = model.head_dim
        queries = model.num_attention_heads // model.query_groups * head
        q, k, v = tensor.unflatten(0, (model.query_groups, -1)).split((queries, head, head), dim=1)
        return {"q": q.flatten(0, 1), "k": k.flatten(0, 1), "v": v.flatten(0, 1)}


@dataclass(frozen=True)
class GateUp(Rule):
    """Gate and up projections of a gated feed-forward layer against Megatron's fc1: gate rows above up rows."""

    gate: str = ""
    up: str = ""

    def hf_names(self) -> dict[str, str]:
        return {"gate": self.gate, "up": self.up}

    def to_megatron(self, parts: Parts, model: ModelConfig) -> Tensor:
        return torch.cat((parts["gate"], parts["up"]))

    def to_hf(self, tensor: Tensor, model: ModelConfig) -> Parts:
        gate, up = tensor.chunk(2)
        return {"gate": gate, "up": up}


@dataclass(frozen=True)
class BlockQkv(Rule):
    """Query, key and value projections in one tensor, all queries first, stored [inputs, outputs] (GPT-2's `c_attn`).

    Megatron's has the three of each head together. GPT-2 has no grouped queries.
    """

    hf: str = ""

    def hf_names(self) -> dict[str, str]:
        return {"tensor": self.hf}

    def to_megatron(self, parts: Parts, model: ModelConfig) -> Tensor:
        blocks: Tensor = parts["tensor"].t().unflatten(0, (3, model.num_attention_heads, -1))
        return blocks.transpose(0, 1).flatten(0, 2).contiguous()

    def to_hf(self, tensor: Tensor, model: ModelConfig) -> Parts:
        heads = tensor.unflatten(0, (model.num_attention_heads, 3, -1))
        return {"tensor": heads.transpose(0, 1).flatten(0, 2).t().contiguous()}


@dataclass(frozen=True)
class AlternatingGateUp(Rule):
    """Gate and up projections in one tensor, by turns, stored [inputs, outputs] (gpt-oss); biases likewise by turns."""

    hf: str = ""

    def hf_names(self) -> dict[str, str]:
        return {"tensor": self.hf}

    def to_megatron(self, parts: Parts, model: ModelConfig) -> Tensor:
        rows = parts["tensor"].t()
        return torch.cat((rows[0::2], rows[1::2]))

    def to_hf(self, tensor: Tensor, model: ModelConfig) -> Parts:
        gate, up = tensor.chunk(2)
        return {"tensor": torch.stack((gate, up), dim=1).flatten(0, 1).t().contiguous()}


def bias_of(rule: Rule, where: Where) -> Rule:
    """The rule of the biases that belong to the weights of `rule`: the same, under the same names, where they exist."""
    names: dict[str, Any] = {
        field.name: value.removesuffix(".weight") + ".bias"
        for field in fields(rule)
        if isinstance(value := getattr(rule, field.name), str)
    }
    return replace(rule, where=where, **names)
