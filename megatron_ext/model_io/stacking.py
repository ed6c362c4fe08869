"""Joins the steps that make one expert each where the files of a class have the experts of a layer in one tensor."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.config import ModelConfig
from megatron_ext.model_io.engine import TensorTask


class _Slot(NamedTuple):
    """Where an expert's tensor is in a file."""

    stack: str
    expert: int
    experts: int


def stacked(tasks: Iterable[TensorTask], architecture: Architecture, model: ModelConfig) -> list[TensorTask]:
    """`tasks`, with one in the place of all that write experts of the same tensors: it writes these tensors whole."""
    slots = {
        stack.parts[0].format(layer=layer, expert=expert): _Slot(stack.hf.format(layer=layer), expert, experts)
        for stack in architecture.stacked
        if stack.written
        for layer in range(model.num_layers)
        for experts in (model.num_moe_experts or 0,)
        for expert in range(experts)
    }
    groups: dict[object, list[TensorTask]] = {}
    for number, task in enumerate(tasks):
        stacks = frozenset(slots[name].stack for name in task.writes.values() if name in slots)
        groups.setdefault(stacks or number, []).append(task)
    return [_joined(group, slots) if isinstance(key, frozenset) else group[0] for key, group in groups.items()]


def _joined(tasks: list[TensorTask], slots: dict[str, _Slot]) -> TensorTask:
    reads = {f"{n}.{role}": name for n, task in enumerate(tasks) for role, name in task.reads.items()}
    stacks = {slots[name].stack for task in tasks for name in task.writes.values()}

    def make(parts: dict[str, Tensor]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for n, task in enumerate(tasks):
            for role, tensor in task.make({r: parts.pop(f"{n}.{r}") for r in task.reads}).items():
                slot = slots[task.writes[role]]
                if slot.stack not in made:
                    made[slot.stack] = tensor.new_empty(slot.experts, *tensor.shape)
                made[slot.stack][slot.expert].copy_(tensor)
        return made

    return TensorTask(reads, {name: name for name in sorted(stacks)}, make)
