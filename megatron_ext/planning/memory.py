"""Memory of the training state of one rank: weights, gradients and optimizer, without activations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_ext.canonical.adapters import adapter_tensors
from megatron_ext.canonical.catalogue import CanonicalTensor, model_tensors
from megatron_ext.canonical.placement import elements_held, stages_of
from megatron_ext.config import Layout, ModelConfig, ParallelConfig, RunConfig


@dataclass(frozen=True)
class StateMemory:
    """One rank's share."""

    parameters: int
    bytes: int
    dense: int
    """Of the trained parameters, those that are no expert's."""
    experts: int
    """And those that are."""
    kept_fp8: int
    """Bytes of the weights in fp8, in both layouts, that the torch backend keeps during a step; not among `bytes`."""
    on_host: int
    """Bytes of the optimizer's moments in the host's memory."""


def state_memory(run: RunConfig, layout: Layout) -> StateMemory:
    """Parameters and bytes of state on the rank that holds most."""
    return max(stage_states(run, layout), key=lambda state: state.bytes)


def stage_states(run: RunConfig, layout: Layout) -> list[StateMemory]:
    """Parameters and bytes of state on a rank of each pipeline stage."""
    return ModelState(run).stages(run, layout)


class ModelState:
    """The tensors of a run, summed up by what places them, so that many layouts can be looked at.

    A trained parameter takes 4 (fp32) or 2 (bf16) bytes and its gradient 4. Adam's two moments take 8 bytes, less in
    bf16 and none where the host has them, and with bf16 weights the fp32 master weight 4: these are split by the
    distributed optimizer over the ranks that have the same weights: data-parallel x context-parallel ranks, and for
    experts those of the expert grid. Weights beside which adapters are trained take their own bytes alone.
    """

    def __init__(self, run: RunConfig) -> None:
        tensors = model_tensors(run.model)
        trained, frozen = (tensors, {}) if run.adapters is None else (adapter_tensors(run.model, run.adapters), tensors)
        self._trained, self._frozen = _summed(trained), _summed(frozen)
        self._fp8 = _summed(_kept_in_fp8(run, tensors))

    def stages(self, run: RunConfig, layout: Layout) -> list[StateMemory]:
        """Parameters and bytes of state on a rank of each pipeline stage of `run`, which may split them otherwise."""
        parts = (self._trained, self._frozen, self._fp8)
        held_of_each = (_stages(run.model, some, layout, run.parallel) for some in parts)
        weight, master = (4, 0) if run.precision.kind == "fp32" else (2, 4)
        moment = run.optimizer.moment_bytes
        there, here = (moment, master) if run.optimizer.moments_on_host else (0, master + moment)
        splits = run.parallel.use_distributed_optimizer
        dense_share, expert_share = (layout.dp * layout.cp, layout.edp) if splits else (1, 1)
        found = []
        for (dense, experts), frozen, fp8 in zip(*held_of_each, strict=True):
            held = (dense + experts) * (weight + 4) + sum(frozen) * weight
            share = math.ceil(dense / dense_share) + math.ceil(experts / expert_share)
            parameters, kept_fp8 = dense + experts + sum(frozen), 2 * sum(fp8)
            found.append(StateMemory(parameters, held + share * here, dense, experts, kept_fp8, share * there))
        return found


def _kept_in_fp8(run: RunConfig, tensors: Mapping[str, CanonicalTensor]) -> dict[str, CanonicalTensor]:
    """The weights of linear layers and experts whose fp8 numbers are kept from micro-batch to micro-batch."""
    precision = run.precision
    if precision.kind != "fp8" or not precision.keep_fp8_weights or run.runtime.backend != "torch":
        return {}
    layers = range(precision.num_layers_at_start_in_bf16, run.model.num_layers - precision.num_layers_at_end_in_bf16)
    # Routers and projections to latent vectors, which stay in bf16, are the matrices that no rank has a part of.
    return {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.layer in layers and tensor.tp_dimension is not None and len(tensor.shape) == 2
    }


def _summed(tensors: Mapping[str, CanonicalTensor]) -> list[CanonicalTensor]:
    """One tensor in the place of all that are split and placed alike, as large as they together."""
    sums: dict[tuple[Any, ...], int] = {}
    first: dict[tuple[Any, ...], CanonicalTensor] = {}
    for name, tensor in tensors.items():
        # Outside the layers the name says where a tensor is.
        key = (tensor.layer, tensor.layer is None and name, tensor.is_expert, tensor.tp_dimension is not None)
        sums[key] = sums.get(key, 0) + tensor.size
        first.setdefault(key, tensor)
    return [replace(first[key], shape=(size,)) for key, size in sums.items()]


def _stages(
    model: ModelConfig, tensors: Sequence[CanonicalTensor], layout: Layout, parallel: ParallelConfig
) -> list[tuple[int, int]]:
    """Dense and expert parameters among `tensors` that a rank of each pipeline stage holds."""
    dense, expert = [0] * layout.pp, [0] * layout.pp
    for tensor in tensors:
        for stage in stages_of(tensor, model, parallel):
            (expert if tensor.is_expert else dense)[stage] += elements_held(tensor, layout)
    return list(zip(dense, expert, strict=True))


def saved_tensors(run: RunConfig) -> Mapping[str, CanonicalTensor]:
    """The tensors whose weights and optimizer state a checkpoint of `run` holds, by canonical name."""
    return model_tensors(run.model) if run.adapters is None else adapter_tensors(run.model, run.adapters)


def checkpoint_bytes(run: RunConfig) -> int:
    """Bytes of a checkpoint's tensors: trained weights, in fp32 the optimizer's own weights, and Adam's two moments."""
    parameters = sum(tensor.size for tensor in saved_tensors(run).values())
    return parameters * ((4 if run.precision.kind == "fp32" else 2) + 4 + run.optimizer.moment_bytes)
