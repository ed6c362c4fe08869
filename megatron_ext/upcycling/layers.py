"""The tensors of an upcycled model by canonical name, made of those of its sources, layer by layer."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_ext.checkpoint.tensors import TensorSource
from megatron_ext.config import LearnedNoise, ModelConfig
from megatron_ext.upcycling.feed_forward import FeedForward
from megatron_ext.upcycling.method import Draw, Method, Reader
from megatron_ext.upcycling.mix import Mix

Piece = Iterator[tuple[str, Tensor]]
"""Some tensors of the target, by canonical name."""
RouterOf = Callable[[int, Draw], Tensor]
"""The router's weight [E, H] of a layer."""


def pieces(
    sources: Sequence[TensorSource], moe: ModelConfig, method: Method, router_of: RouterOf, seed: int
) -> Iterator[Callable[[], Piece]]:
    """Everything that makes the model, as steps that may run in any order and at the same time.

    Args:
        sources: dense models of one shape, by canonical names.
    """
    for name in sources[0].specs:
        if ".mlp.linear_fc" not in name:
            yield partial(_common, sources, method, name)
    for layer, is_moe in enumerate(moe.moe_layer_pattern):
        prefix = f"decoder.layers.{layer}.mlp"
        if is_moe:
            readers = [partial(_feed_forward, source, prefix) for source in sources]
            yield partial(moe_layer, prefix, readers, moe, method, partial(router_of, layer), seed)
        else:
            for name in _names(prefix):
                if name in sources[0].specs:
                    yield partial(_common, sources, method, name)


def _common(sources: Sequence[TensorSource], method: Method, name: str) -> Piece:
    """What is not an expert: the source's own, or the average of several."""
    if isinstance(method, Mix):
        yield name, method.average([partial(source.read, name) for source in sources])
    else:
        yield name, sources[0].read(name)


def moe_layer(
    prefix: str,
    readers: Sequence[Reader],
    moe: ModelConfig,
    method: Method,
    router_of: Callable[[Draw], Tensor],
    seed: int,
) -> Piece:
    """Yield every tensor of a MoE layer's feed-forward part, named from `prefix`."""
    draw = Draw(seed, prefix)
    made, experts = method.layer(readers, moe, draw), moe.num_moe_experts or 0
    for expert, network in enumerate(made.experts):
        yield from _named(f"{prefix}.experts.{expert}", network.times(method.folded(moe)))
    if made.shared is not None:
        # A gate of zeros lets half of it through.
        gated = 2.0 if moe.moe_shared_expert_gate else 1.0
        yield from _named(f"{prefix}.shared_experts", made.shared.times(gated))
    if moe.moe_shared_expert_gate:
        yield f"{prefix}.shared_experts.gate_weight", torch.zeros(1, moe.hidden_size)
    if moe.moe_router_enable_expert_bias:
        yield f"{prefix}.router.expert_bias", torch.zeros(experts)
    if isinstance(moe.moe_router_noise, LearnedNoise):
        yield f"{prefix}.router.noise_weight", torch.zeros(experts, moe.hidden_size)
    yield f"{prefix}.router.weight", router_of(draw)


def _feed_forward(source: TensorSource, prefix: str) -> FeedForward:
    *weights, fc1_bias, fc2_bias = _names(prefix)
    fc1, fc2 = map(source.read, weights)
    biases = (source.read(name) if name in source.specs else None for name in (fc1_bias, fc2_bias))
    return FeedForward(fc1, fc2, *biases)


def _named(prefix: str, network: FeedForward) -> Piece:
    tensors = (network.fc1, network.fc2, network.fc1_bias, network.fc2_bias)
    for name, tensor in zip(_names(prefix), tensors, strict=True):
        if tensor is not None:
            yield name, tensor


def _names(prefix: str) -> tuple[str, ...]:
    """The tensors of a feed-forward network in the order of FeedForward's fields."""
    return tuple(f"{prefix}.linear_{layer}.{kind}" for kind in ("weight", "bias") for layer in ("fc1", "fc2"))
