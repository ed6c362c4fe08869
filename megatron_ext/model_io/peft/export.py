"""Writes adapters as a directory that the PEFT library loads, experts in the layout that it reads them in.

transformers 5 keeps the experts of a layer in two tensors. PEFT adapts such a tensor by name (`target_parameters`): A
has its rows expert by expert, B its columns rank by rank with the experts next to each other. In classes with such
tensors PEFT takes every module called gate_proj, up_proj or down_proj for part of one (`target_modules` there are
dropped without an error), so that those outside the experts are named as parameters too.
"""

#   E experts, R rank, I inputs, O outputs

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.canonical.adapters import AdapterPair
from megatron_ext.canonical.catalogue import EMBEDDING, OUTPUT
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConversionError
from megatron_ext.model_io.adapters import Adapters
from megatron_ext.model_io.peft.files import write_directory
from megatron_ext.model_io.peft.fused import join
from megatron_ext.model_io.peft.names import FEED_FORWARD, Experts, HuggingFaceNames

PeftLayout = Literal["stacked", "experts"]
PREFIX = "base_model.model."


@dataclass
class _Content:
    """What is put together for a PEFT directory."""

    use_rslora: bool
    are_transposed: bool = False
    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    sizes: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Rank and scale of each module and parameter."""

    def config(self, base: str) -> dict[str, Any]:
        """The file adapter_config.json."""
        ranks = {name: rank for name, (rank, _) in self.sizes.items()}
        alphas = {
            name: scale * (math.sqrt(rank) if self.use_rslora else rank) for name, (rank, scale) in self.sizes.items()
        }
        rank, alpha = _most(list(ranks.values())), _most(list(alphas.values()))
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": _number(alpha),
            "lora_dropout": 0.0,
            "target_modules": self.modules,
            "target_parameters": self.parameters or None,
            "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
            "alpha_pattern": {name: _number(value) for name, value in alphas.items() if value != alpha},
            "use_rslora": self.use_rslora,
            "bias": "none",
            "fan_in_fan_out": self.are_transposed,
            "modules_to_save": None,
            "inference_mode": True,
        }


def _most(values: list[Any]) -> Any:
    return max(dict.fromkeys(values), key=values.count)


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def export_peft(
    adapters: Adapters, architecture: Architecture, target: str | Path, base: str, layout: PeftLayout, *, force: bool
) -> int:
    """Write `adapters` as a PEFT directory for the model `base`, a Hugging Face directory or name of `architecture`.

    Args:
        layout: `stacked`, as PEFT of transformers 5 reads experts; `experts`: every expert's modules under names of
            their own, for older readers.

    Returns:
        How many tensors were written.

    Raises:
        ConversionError: it cannot be written; nothing that looks complete is left behind.
    """
    names = HuggingFaceNames(architecture, adapters.model)
    if names.hides_experts and any(pair.is_expert for pair in adapters.pairs):
        raise ConversionError(
            f"{architecture.hf_class} has its experts in tensors with gate and up by turns, where adapters of experts "
            "cannot be written for PEFT; merge them into the weights, or train adapters of attention alone"
        )
    experts = names.experts() if layout == "stacked" else {}
    content = _Content(adapters.config.use_rslora, names.are_transposed)
    together: dict[str, list[AdapterPair]] = {}
    of_experts: dict[int, dict[str, list[AdapterPair]]] = {}
    for pair in adapters.pairs:
        if pair.is_expert and experts:
            of_experts.setdefault(pair.layer or 0, {}).setdefault(pair.projection, []).append(pair)
        elif names.fused(pair) is not None:
            together.setdefault(names.module(pair), []).append(pair)
        else:
            _add_module(content, adapters, pair, names.module(pair), as_parameter=bool(experts))
    for module, of_module in together.items():
        _add_together(content, adapters, of_module, module, names)
    for layer, pairs in of_experts.items():
        _add_experts(content, adapters, pairs, experts[layer])
    inputs = [adapters.directory, *([Path(base)] if Path(base).exists() else [])]
    write_directory(Path(target), content.config(base), content.tensors, force=force, inputs=inputs)
    return len(content.tensors)


def _add_module(content: _Content, adapters: Adapters, pair: AdapterPair, module: str, *, as_parameter: bool) -> None:
    a, b = (_trimmed(adapters.tensors.read(name), pair, adapters.model) for name in (pair.a, pair.b))
    key = f"{PREFIX}{module}."
    name = module
    if pair.is_embedding:
        content.tensors[f"{key}lora_embedding_A"], content.tensors[f"{key}lora_embedding_B"] = a, b
    else:
        content.tensors[f"{key}lora_A.weight"], content.tensors[f"{key}lora_B.weight"] = a, b
    if as_parameter and pair.projection in FEED_FORWARD:
        name = f"{module}.weight"
        content.parameters.append(name)
    else:
        content.modules.append(name)
    content.sizes[name] = pair.rank, pair.scale


def _add_together(
    content: _Content, adapters: Adapters, pairs: list[AdapterPair], module: str, names: HuggingFaceNames
) -> None:
    """The adapters of queries, keys and values as one of the module that has them together."""
    rule = names.fused(pairs[0])
    assert rule is not None
    halves = {p.projection: (adapters.tensors.read(p.a), adapters.tensors.read(p.b), p.scale) for p in pairs}
    a_RI, b_OR, scale = join(halves, rule, adapters.model)
    content.tensors[f"{PREFIX}{module}.lora_A.weight"], content.tensors[f"{PREFIX}{module}.lora_B.weight"] = a_RI, b_OR
    content.modules.append(module)
    content.sizes[module] = len(a_RI), scale


def _trimmed(half: Tensor, pair: AdapterPair, model: ModelConfig) -> Tensor:
    """A half without the padding of the vocabulary."""
    if pair.weight == EMBEDDING and half.shape[1] == model.padded_vocab_size and half.shape[0] == pair.rank:
        half = half[:, : model.vocab_size]
    if pair.weight == OUTPUT and half.shape[0] == model.padded_vocab_size and half.shape[1] == pair.rank:
        half = half[: model.vocab_size]
    return half.contiguous()


def _add_experts(content: _Content, adapters: Adapters, pairs: dict[str, list[AdapterPair]], experts: Experts) -> None:
    """The adapters of one layer's routed experts as those of its one or two tensors."""

    def stacked(projection: str) -> tuple[Tensor, Tensor, float]:
        of_each = pairs[projection]
        a_ERI = torch.stack([adapters.tensors.read(pair.a) for pair in of_each])
        b_EOR = torch.stack([adapters.tensors.read(pair.b) for pair in of_each])
        return a_ERI, b_EOR, of_each[0].scale

    # PEFT wraps the module once for each tensor; the last wrapper has its name alone.
    inner = ".base_layer" if "down" in pairs else ""
    if first := [name for name in ("gate", "up") if name in pairs]:
        a_ERI, b_EOR, scale = _joined([stacked(name) if name in first else None for name in ("gate", "up")])
        name = f"{experts.module}.{experts.gate_up}"
        _put(content, name, f"{PREFIX}{experts.module}{inner}.", a_ERI, b_EOR, scale)
    if "down" in pairs:
        _put(content, f"{experts.module}.{experts.down}", f"{PREFIX}{experts.module}.", *stacked("down"))


def _joined(halves: list[tuple[Tensor, Tensor, float] | None]) -> tuple[Tensor, Tensor, float]:
    """Gate and up as one adapter of the tensor that has both: A one above the other, B a block for each."""
    there = [half for half in halves if half is not None]
    scale, width = there[0][2], there[0][1].shape[1]
    blocks = []
    for half in halves:
        row = [torch.zeros(len(a), width, a.shape[1], dtype=b.dtype) for a, b, _ in there]
        if half is not None:
            number = next(n for n, one in enumerate(there) if one is half)
            row[number] = half[1] * (half[2] / scale)
        blocks.append(torch.cat(row, dim=2))
    return torch.cat([a for a, _, _ in there], dim=1), torch.cat(blocks, dim=1), scale


def _put(content: _Content, name: str, key: str, a_ERI: Tensor, b_EOR: Tensor, scale: float) -> None:
    content.parameters.append(name)
    content.sizes[name] = a_ERI.shape[1], scale
    content.tensors[f"{key}lora_A.weight"] = a_ERI.flatten(0, 1).contiguous()
    content.tensors[f"{key}lora_B.weight"] = b_EOR.permute(1, 2, 0).flatten(1, 2).contiguous()
