"""Applies weight rules in either direction, accounting for every tensor. transfer.py then moves the bytes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from megatron_ext.architectures.tables.rules import Rule
from megatron_ext.canonical.catalogue import IN_FP32, model_shapes
from megatron_ext.checkpoint.shape_faults import shape_faults, shown, unexpected_tensors
from megatron_ext.checkpoint.streams import TensorSource, TensorSpec
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConversionError


@dataclass(frozen=True)
class TensorTask:
    """Some target tensors made of some source tensors by one rule."""

    reads: dict[str, str]
    """Source name by role."""
    writes: dict[str, str]
    """Target name by role."""
    make: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    """From source tensors by role to target tensors by role."""
    dtype: torch.dtype | None = None
    """What the targets are, whatever dtype the conversion is to."""
    note: str = ""
    """What is done to what is read, for people."""


class HasSpecs(Protocol):
    """Tensors that are known, though perhaps not there yet."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor."""


MEGATRON = "megatron"


def tasks_to_hf(rules: tuple[Rule, ...], model: ModelConfig) -> Iterator[TensorTask]:
    """Every step from Megatron's tensors of `model` to Hugging Face's."""
    for rule, holes in expanded(rules, model):
        names = {role: name.format(**holes) for role, name in rule.hf_names().items()}
        yield TensorTask(
            {MEGATRON: rule.megatron.format(**holes)},
            names,
            partial(_to_hf, rule, model),
            rule.dtype,
        )


def tasks_to_megatron(rules: tuple[Rule, ...], model: ModelConfig) -> Iterator[TensorTask]:
    """Every step from Hugging Face's tensors to Megatron's tensors of `model`."""
    for rule, holes in expanded(rules, model):
        names = {role: name.format(**holes) for role, name in rule.hf_names().items()}
        yield TensorTask(
            names,
            {MEGATRON: rule.megatron.format(**holes)},
            partial(_to_megatron, rule, model),
            rule.dtype,
        )


def _to_hf(rule: Rule, model: ModelConfig, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return rule.to_hf(parts[MEGATRON], model)


def _to_megatron(rule: Rule, model: ModelConfig, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {MEGATRON: rule.to_megatron(parts, model)}


def copies(source: TensorSource) -> Iterator[TensorTask]:
    """Every tensor of `source` under its own name."""
    for name in source.specs:
        yield TensorTask({MEGATRON: name}, {MEGATRON: name}, dict)


def expanded(rules: tuple[Rule, ...], model: ModelConfig) -> Iterator[tuple[Rule, dict[str, int]]]:
    """Rules with filled holes: what stands before the layers, layer by layer, what stands after them."""
    steps = [(rule, holes) for rule in rules for holes in rule.holes(model)]
    first = next((n for n, (_, holes) in enumerate(steps) if "layer" in holes), 0)
    order = {
        n: (0, 0) if n < first else (1, holes["layer"]) if "layer" in holes else (2, 0)
        for n, (_, holes) in enumerate(steps)
    }
    for number in sorted(order, key=lambda n: order[n]):
        yield steps[number]


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
    present = {name: spec.shape for name, spec in source.specs.items() if name in expected or name not in ignore}
    faults = shape_faults(present, expected, "the configuration says") + unexpected_tensors(present, expected)
    if faults:
        raise ConversionError(f"{where} does not hold the model its configuration describes:\n{shown(faults)}")


def target_specs(tasks: Iterator[TensorTask], source: HasSpecs, dtype: torch.dtype | None) -> dict[str, TensorSpec]:
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


def stored_dtype(canonical: str, own: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """The dtype in which a Megatron checkpoint holds a tensor, by its name, where `asked` (or its own) is wanted."""
    return torch.float32 if IN_FP32.fullmatch(canonical) else asked or own


def followed_by(first: Sequence[TensorTask], second: Iterable[TensorTask]) -> list[TensorTask]:
    """The tasks of `first`, each with those of `second` that go on with what it writes (one tensor each)."""
    by_name = {task.reads[MEGATRON]: task for task in second}

    def joined(task: TensorTask) -> TensorTask:
        following = {role: by_name[name] for role, name in task.writes.items()}
        writes = {f"{role}.{r}": name for role, next_one in following.items() for r, name in next_one.writes.items()}

        def make(parts: dict[str, Tensor]) -> dict[str, Tensor]:
            made = task.make(parts)
            return {
                f"{role}.{r}": tensor
                for role, next_one in following.items()
                for r, tensor in next_one.make({MEGATRON: made[role]}).items()
            }

        return TensorTask(task.reads, writes, make)

    return [joined(task) for task in first]
