"""Memory of the training state of one rank: weights, gradients and optimizer, without activations."""

import math
from dataclasses import dataclass

from megatron_ext.canonical.catalogue import model_tensors
from megatron_ext.canonical.placement import elements_held, stages_of
from megatron_ext.config import Layout, ModelConfig, ParallelConfig, Precision, RunConfig


@dataclass(frozen=True)
class StateMemory:
    """The fullest rank's share."""

    parameters: int
    bytes: int


def state_memory(run: RunConfig, layout: Layout) -> StateMemory:
    """Parameters and bytes of state on the rank that holds most.

    A parameter takes 4 (fp32) or 2 (bf16) bytes and its gradient 4. Adam's two moments (and in bf16 the fp32 master
    weight) take 8 (12) bytes, split by the distributed optimizer over the ranks that have the same
    weights: data-parallel x context-parallel ones, and for experts those of the expert grid.
    """
    stages = _stages(run.model, layout, run.parallel)
    weight, state = (4, 8) if run.precision.kind == "fp32" else (2, 12)
    dense_share = layout.dp * layout.cp if run.parallel.use_distributed_optimizer else 1
    expert_share = layout.edp if run.parallel.use_distributed_optimizer else 1

    def size(dense: int, expert: int) -> int:
        held = (dense + expert) * (weight + 4)
        return held + math.ceil(dense / dense_share) * state + math.ceil(expert / expert_share) * state

    dense, expert = max(stages, key=lambda parts: size(*parts))
    return StateMemory(dense + expert, size(dense, expert))


def _stages(model: ModelConfig, layout: Layout, parallel: ParallelConfig) -> list[tuple[int, int]]:
    """Dense and expert parameters that a rank of each pipeline stage holds."""
    dense, expert = [0] * layout.pp, [0] * layout.pp
    for tensor in model_tensors(model).values():
        for stage in stages_of(tensor, model, parallel):
            (expert if tensor.is_expert else dense)[stage] += elements_held(tensor, layout)
    return list(zip(dense, expert, strict=True))


def checkpoint_bytes(model: ModelConfig, precision: Precision) -> int:
    """Bytes of a checkpoint's tensors: weights, and in fp32 the optimizer's own weights and Adam's two moments."""
    parameters = sum(tensor.size for tensor in model_tensors(model).values())
    return parameters * ((4 if precision.kind == "fp32" else 2) + 12)
