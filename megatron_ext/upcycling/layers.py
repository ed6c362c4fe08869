"""What makes an upcycled model: one task for each expert, router and tensor that stays."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from megatron_ext.canonical.catalogue import model_shapes
from megatron_ext.config import LearnedNoise, ModelConfig
from megatron_ext.model_io.engine import TensorTask
from megatron_ext.upcycling.feed_forward import FeedForward
from megatron_ext.upcycling.methods.base import Draw, Method
from megatron_ext.upcycling.sources import AVERAGE

RouterOf = Callable[[int, Draw], Tensor]
"""The router's weight [E, H] of a layer."""
_PARTS = {
    "fc1": "linear_fc1.weight",
    "fc2": "linear_fc2.weight",
    "fc1_bias": "linear_fc1.bias",
    "fc2_bias": "linear_fc2.bias",
}
"""Names of the tensors of a feed-forward network, by the fields of FeedForward."""


def upcycling_tasks(
    dense: ModelConfig, moe: ModelConfig, method: Method, router_of: RouterOf, *, sources: int, seed: int
) -> Iterator[TensorTask]:
    """Every step from the tensors of `Sources` to the canonical tensors of `moe`, in the order of the layers."""
    names = model_shapes(dense)
    for name in names:
        if ".mlp.linear_fc" not in name:
            yield copied(name)
    for layer, is_moe in enumerate(moe.moe_layer_pattern):
        prefix = f"decoder.layers.{layer}.mlp"
        parts = [part for part, name in _PARTS.items() if f"{prefix}.{name}" in names]
        if is_moe:
            yield from layer_tasks(prefix, parts, moe, method, partial(router_of, layer), sources=sources, seed=seed)
        else:
            yield from (copied(f"{prefix}.{_PARTS[part]}") for part in parts)


def copied(name: str) -> TensorTask:
    """The step that leaves a tensor as it is; of several sources, their average."""
    return TensorTask({"tensor": f"{AVERAGE}/{name}"}, {"tensor": name}, dict)


def layer_tasks(
    prefix: str,
    parts: list[str],
    moe: ModelConfig,
    method: Method,
    router_of: Callable[[Draw], Tensor],
    *,
    sources: int,
    seed: int,
) -> Iterator[TensorTask]:
    """Every step that makes the feed-forward part of one MoE layer.

    Args:
        prefix: canonical name of that part.
        parts: fields of FeedForward that the dense layer has.
    """
    draw, experts = Draw(seed, prefix), moe.num_moe_experts or 0

    def read(source: str) -> dict[str, str]:
        return {part: f"{source}/{prefix}.{_PARTS[part]}" for part in parts}

    def write(network: str) -> dict[str, str]:
        return {part: f"{prefix}.{network}.{_PARTS[part]}" for part in parts}

    for expert in range(experts):
        source = str(expert * sources // experts)
        make = partial(_expert, method, expert, moe, draw)
        yield TensorTask(read(source), write(f"experts.{expert}"), make, note=method.changes(moe) or "")
    if moe.moe_shared_expert_intermediate_size is not None:
        source = AVERAGE if method.shared_from_average else "0"
        make = partial(_shared, method, moe, draw)
        yield TensorTask(read(source), write("shared_experts"), make, note=method.shared_origin())
    yield _made(f"{prefix}.router.weight", partial(router_of, draw), "made by router_init")
    # All of these start where they change nothing.
    if moe.moe_shared_expert_gate:
        yield _made(f"{prefix}.shared_experts.gate_weight", partial(torch.zeros, 1, moe.hidden_size))
    if moe.moe_router_linear_bias:
        yield _made(f"{prefix}.router.bias", partial(torch.zeros, experts))
    if moe.moe_router_enable_expert_bias:
        yield _made(f"{prefix}.router.expert_bias", partial(torch.zeros, experts))
    if isinstance(moe.moe_router_noise, LearnedNoise):
        yield _made(f"{prefix}.router.noise_weight", partial(torch.zeros, experts, moe.hidden_size))


def _made(name: str, make: Callable[[], Tensor], note: str = "zero") -> TensorTask:
    return TensorTask({}, {"tensor": name}, lambda parts: {"tensor": make()}, note=note)


def _expert(method: Method, number: int, moe: ModelConfig, draw: Draw, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return _tensors(method.expert(number, FeedForward(**parts), moe, draw).times(method.folded(moe)))


def _shared(method: Method, moe: ModelConfig, draw: Draw, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    # A gate of zeros lets half of it through.
    gated = 2.0 if moe.moe_shared_expert_gate else 1.0
    return _tensors(method.shared(FeedForward(**parts), moe, draw).times(gated))


def _tensors(network: FeedForward) -> dict[str, Tensor]:
    return {part: tensor for part in _PARTS if (tensor := getattr(network, part)) is not None}
