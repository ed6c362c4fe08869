"""From the section `adapters` of a run to what its modules are built from, and to a model of which they alone train."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

from megatron_ext.canonical.adapters import LORA, projection_rows
from megatron_ext.canonical.catalogue import model_tensors
from megatron_ext.config import LoraConfig, ModelConfig
from megatron_ext.config.adapters import EMBEDDING_MODULE, EXPERTS_PART, adapted_projections, projections
from megatron_ext.mcore.adapters.experts import ExpertAdapters
from megatron_ext.mcore.adapters.linear import ColumnAdapters, EmbeddingAdapters, ReplicatedAdapters, RowAdapters
from megatron_ext.mcore.adapters.low_rank import LowRank, ModuleAdapters
from megatron_ext.mcore.adapters.rewrite import NO_ADAPTERS, AdapterPlan
from megatron_ext.mcore.mla import DownProjection
from megatron_ext.mcore.moe.experts import GroupedExperts

_KINDS: tuple[tuple[type, type], ...] = (
    (GroupedExperts, ExpertAdapters),
    (DownProjection, ReplicatedAdapters),
    (ColumnParallelLinear, ColumnAdapters),
    (RowParallelLinear, RowAdapters),
    (VocabParallelEmbedding, EmbeddingAdapters),
)
"""What computes the adapters of each kind of module."""


def adapter_plan(model: ModelConfig, adapters: LoraConfig | None) -> AdapterPlan:
    """What is built in place of every module of `model` that has adapters."""
    if adapters is None:
        return NO_ADAPTERS
    found: dict[tuple[int | None, str], list[tuple[str, LowRank]]] = {}
    for projection, target in adapted_projections(model, adapters).items():
        part, linear = projection.part, ""
        if projection.is_expert:
            part, linear = EXPERTS_PART, projection.part.removeprefix(f"{EXPERTS_PART}.")
        low_rank = LowRank(projection.name, target.rank, adapters.scale(target), target.dropout)
        found.setdefault((projection.layer, part), []).append((linear, low_rank))
    outputs = _outputs(model)
    plan = {}
    for (layer, part), pairs in found.items():
        module = part if layer is None else f"decoder.layers.{layer}.{part}"
        is_qkv = part.endswith("linear_qkv")
        groups = model.query_groups if is_qkv else 1
        adapted = ModuleAdapters(tuple(pairs), outputs.get(module, ()), groups, groups_are_split=is_qkv)
        name = part if layer is None else f"layers.{layer}.{part}"
        plan[name] = functools.partial(_with, adapted)
    return plan


def _outputs(model: ModelConfig) -> dict[str, tuple[tuple[str, int], ...]]:
    """The projections of every module's outputs in their order, but for routed experts."""
    tensors = model_tensors(model)
    found: dict[str, tuple[tuple[str, int], ...]] = {}
    for projection in projections(model):
        weight = tensors.get(f"{projection.module}.weight")
        if weight is not None:
            rows = weight.shape[1] if projection.module == EMBEDDING_MODULE else weight.shape[0]
            own = (projection.name, projection_rows(model, projection.part, projection.name, rows))
            found[projection.module] = (*found.get(projection.module, ()), own)
    return found


@functools.cache
def _with(adapters: ModuleAdapters, base: type) -> type:
    """`base` with `adapters` beside its weight."""
    kind = next((kind for of, kind in _KINDS if issubclass(base, of)), None)
    if kind is None:
        raise TypeError(f"{base.__name__}: nothing computes adapters beside it")
    return type(f"Adapted{base.__name__}", (kind, base), {"adapters": adapters})


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name, or a stored tensor of this key, is an adapter's."""
    return LORA in f".{name}"


def freeze_base(chunks: Sequence[Any]) -> None:
    """Leave only the adapters of `chunks` to be trained. Wrapping them, later, sees trained parameters alone."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(is_adapter(name))
        if chunk.pre_process:
            chunk.embedding.register_forward_hook(_needs_gradient)


def _needs_gradient(module: torch.nn.Module, inputs: Any, embedded: torch.Tensor) -> None:
    """Recomputed layers compute gradients only of inputs that need one, which a frozen embedding does not give."""
    if torch.is_grad_enabled() and not embedded.requires_grad:
        embedded.requires_grad_()


@contextmanager
def adapters_off(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Within it the base alone computes: the reference of preference optimisation. Not across a backward pass."""
    kinds = tuple(kind for _, kind in _KINDS)
    modules: list[Any] = [module for chunk in chunks for module in chunk.modules() if isinstance(module, kinds)]
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module in modules:
            del module.enabled
