"""Applies weight rules in either direction, from a tensor source to a tensor sink, accounting for every tensor."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_ext.architectures.rules import Rule
from megatron_ext.checkpoint.shapes import model_shapes
from megatron_ext.checkpoint.tensors import TensorSink, TensorSource, TensorSpec
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConversionError


@dataclass(frozen=True)
class Task:
    """Some target tensors made of some source tensors by one rule."""

    reads: dict[str, str]
    """Source name by role."""
    writes: dict[str, str]
    """Target name by role."""
    make: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    """From source tensors by role to target tensors by role."""
    dtype: torch.dtype | None = None
    """What the targets are, whatever dtype the conversion is to."""


MEGATRON = "megatron"


def tasks_to_hf(rules: tuple[Rule, ...], model: ModelConfig) -> Iterator[Task]:
    """Every step from Megatron's tensors of `model` to Hugging Face's."""
    for rule, holes in _expanded(rules, model):
        names = {role: name.format(**holes) for role, name in rule.hf_names().items()}
        yield Task(
            {MEGATRON: rule.megatron.format(**holes)},
            names,
            partial(_to_hf, rule, model),
            rule.dtype,
        )


def tasks_to_megatron(rules: tuple[Rule, ...], model: ModelConfig) -> Iterator[Task]:
    """Every step from Hugging Face's tensors to Megatron's tensors of `model`."""
    for rule, holes in _expanded(rules, model):
        names = {role: name.format(**holes) for role, name in rule.hf_names().items()}
        yield Task(
            names,
            {MEGATRON: rule.megatron.format(**holes)},
            partial(_to_megatron, rule, model),
            rule.dtype,
        )


def _to_hf(rule: Rule, model: ModelConfig, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return rule.to_hf(parts[MEGATRON], model)


def _to_megatron(rule: Rule, model: ModelConfig, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {MEGATRON: rule.to_megatron(parts, model)}


def _expanded(rules: tuple[Rule, ...], model: ModelConfig) -> Iterator[tuple[Rule, dict[str, int]]]:
    for rule in rules:
        for holes in rule.holes(model):
            yield rule, holes


def hf_shapes(rules: tuple[Rule, ...], model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the Hugging Face tensors of `model`."""
    megatron = model_shapes(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for task in tasks_to_hf(rules, model):
        made = task.make({role: torch.empty(megatron[name], device="meta") for role, name in task.reads.items()})
        shapes.update({task.writes[role]: tuple(tensor.shape) for role, tensor in made.items()})
    return shapes


def check_source(
    source: TensorSource, expected: Mapping[str, tuple[int, ...]], *, where: str, ignore: frozenset[str] = frozenset()
) -> None:
    """Raise ConversionError listing every tensor of `source` that is missing, unexpected or misshapen.

    Args:
        ignore: tensors that may be there and are not used.
    """
    present = source.specs
    faults = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in present]
    faults += [
        f"unexpected: {name} {list(spec.shape)}"
        for name, spec in present.items()
        if name not in expected and name not in ignore
    ]
    faults += [
        f"misshapen: {name} is {list(present[name].shape)}, the configuration says {list(shape)}"
        for name, shape in expected.items()
        if name in present and present[name].shape != shape
    ]
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:30])
        more = f"\n  and {len(faults) - 30} more" if len(faults) > 30 else ""
        raise ConversionError(f"{where} does not hold the model its configuration describes:\n{shown}{more}")


def target_specs(tasks: Iterator[Task], source: TensorSource, dtype: torch.dtype | None) -> dict[str, TensorSpec]:
    """What `tasks` will write, found by running them on tensors without memory; `dtype` None keeps the source's."""
    present = source.specs
    specs: dict[str, TensorSpec] = {}
    for task in tasks:
        parts = {
            role: torch.empty(present[name].shape, dtype=present[name].dtype, device="meta")
            for role, name in task.reads.items()
        }
        for role, tensor in task.make(parts).items():
            specs[task.writes[role]] = TensorSpec(tuple(tensor.shape), task.dtype or dtype or tensor.dtype)
    return specs


def run_tasks(tasks: Iterator[Task], source: TensorSource, sink: TensorSink, advance: Callable[[int], None]) -> None:
    """Read, transform and write, one task at a time; `advance` is told the bytes written."""
    for task in tasks:
        made = task.make({role: source.read(name) for role, name in task.reads.items()})
        for role, tensor in made.items():
            sink.write(task.writes[role], tensor)
            advance(tensor.numel() * tensor.itemsize)
