"""Memory of the training state of one rank: weights, gradients and optimizer, without activations."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ext.canonical.adapters import adapter_tensors
from megatron_ext.canonical.catalogue import CanonicalTensor, model_tensors
from megatron_ext.canonical.placement import elements_held, stages_of
from megatron_ext.config import Layout, LoraConfig, ModelConfig, ParallelConfig, Precision, RunConfig


@dataclass(frozen=True)
class StateMemory:
    """One rank's share."""

    parameters: int
    bytes: int
    largest_buffer: int
    """Gradients of the larger of its two buffers, of dense weights and of experts', in bytes."""


def state_memory(run: RunConfig, layout: Layout) -> StateMemory:
    """Parameters and bytes of state on the rank that holds most."""
    return max(stage_states(run, layout), key=lambda state: state.bytes)


def stage_states(run: RunConfig, layout: Layout) -> list[StateMemory]:
    """Parameters and bytes of state on a rank of each pipeline stage.

    A trained parameter takes 4 (fp32) or 2 (bf16) bytes and its gradient 4. Adam's two moments (and in bf16 the fp32
    master weight) take 8 (12) bytes, split by the distributed optimizer over the ranks that have the same weights:
    data-parallel x context-parallel ones, and for experts those of the expert grid. Weights beside which adapters are
    trained take their own bytes alone.
    """
    tensors = model_tensors(run.model)
    trained, frozen = (tensors, {}) if run.adapters is None else (adapter_tensors(run.model, run.adapters), tensors)
    stages = list(zip(*(_stages(run.model, some, layout, run.parallel) for some in (trained, frozen)), strict=True))
    weight, state = (4, 8) if run.precision.kind == "fp32" else (2, 12)
    dense_share = layout.dp * layout.cp if run.parallel.use_distributed_optimizer else 1
    expert_share = layout.edp if run.parallel.use_distributed_optimizer else 1

    def size(trained: tuple[int, int], frozen: tuple[int, int]) -> int:
        held = sum(trained) * (weight + 4) + sum(frozen) * weight
        dense, expert = trained
        return held + math.ceil(dense / dense_share) * state + math.ceil(expert / expert_share) * state

    return [StateMemory(sum(map(sum, parts)), size(*parts), 4 * max(parts[0])) for parts in stages]


def _stages(
    model: ModelConfig, tensors: Mapping[str, CanonicalTensor], layout: Layout, parallel: ParallelConfig
) -> list[tuple[int, int]]:
    """Dense and expert parameters among `tensors` that a rank of each pipeline stage holds."""
    dense, expert = [0] * layout.pp, [0] * layout.pp
    for tensor in tensors.values():
        for stage in stages_of(tensor, model, parallel):
            (expert if tensor.is_expert else dense)[stage] += elements_held(tensor, layout)
    return list(zip(dense, expert, strict=True))


def checkpoint_bytes(model: ModelConfig, precision: Precision, adapters: LoraConfig | None = None) -> int:
    """Bytes of a checkpoint's tensors: trained weights, in fp32 the optimizer's own weights and Adam's two moments."""
    tensors = model_tensors(model) if adapters is None else adapter_tensors(model, adapters)
    parameters = sum(tensor.size for tensor in tensors.values())
    return parameters * ((4 if precision.kind == "fp32" else 2) + 12)
