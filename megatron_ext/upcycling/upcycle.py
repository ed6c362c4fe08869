"""Makes a MoE checkpoint out of a dense one: a method applied layer by layer between two tensor streams."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.checkpoint.naming import seed_from_name
from megatron_ext.checkpoint.shapes import model_shapes
from megatron_ext.checkpoint.store import read_run, require_checkpoint
from megatron_ext.checkpoint.tensors import MegatronSink, MegatronSource, TensorSource, TensorSpec
from megatron_ext.config import LearnedNoise, ModelConfig, check_model, to_mapping
from megatron_ext.conversion.checkpoint_model import read_model, tokenizer_directory
from megatron_ext.conversion.engine import check_source
from megatron_ext.errors import ConfigError
from megatron_ext.upcycling.copy import Copy
from megatron_ext.upcycling.method import FeedForward, Method

METHODS: dict[str, Method] = {method.name: method for method in (Copy(),)}

# Everything but the feed-forward layers must stay what it is.
_MAY_CHANGE = {
    name
    for name in ModelConfig.__dataclass_fields__
    if name.startswith("moe_") or name in ("num_moe_experts", "init_method_std", "transformer_overrides")
}


def upcycle(
    source: str | Path,
    target: str | Path,
    moe: ModelConfig,
    method: Method,
    *,
    seed: int,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write to `target` a Megatron checkpoint of `moe` made of the dense Megatron checkpoint `source`.

    Routers are normal with `moe.init_method_std`, drawn from `seed` and their names. The optimizer is not carried.

    Raises:
        ConfigError: there is no such model, or the method cannot make it of that one.
        ConversionError, CheckpointError: nothing that looks complete is left behind.
    """
    dense = read_model(source)
    check_models(dense, moe, method)
    stream = MegatronSource(source)
    check_source(stream, model_shapes(dense), where=str(stream.directory))
    dtype = stream.specs["embedding.word_embeddings.weight"].dtype
    specs = {name: TensorSpec(shape, dtype) for name, shape in model_shapes(moe).items()}
    run: dict[str, Any] = {**read_run(require_checkpoint(source)), "model": to_mapping(moe)}
    total = sum(torch.Size(spec.shape).numel() * dtype.itemsize for spec in specs.values())
    done = 0
    tokenizer = tokenizer_directory(source)
    with MegatronSink(target, specs, run, tokenizer=tokenizer, force=force, inputs=[stream.directory]) as sink:
        for name, tensor in upcycled_tensors(stream, moe, method, seed):
            sink.write(name, tensor)
            done += tensor.numel() * dtype.itemsize
            progress(done, total)


def check_models(dense: ModelConfig, moe: ModelConfig, method: Method) -> None:
    """Raise ConfigError where `moe` is not `dense` with experts, or the method cannot make it."""
    if dense.is_moe:
        raise ConfigError("the source is a MoE model already; upcycling starts from a dense one")
    if not moe.is_moe:
        raise ConfigError("the target has no experts; set num_moe_experts")
    check_model(moe, source="the upcycled model")
    changed = [
        f"  {name}: {getattr(dense, name)!r} in the source, {getattr(moe, name)!r} in the target"
        for name in ModelConfig.__dataclass_fields__
        if name not in _MAY_CHANGE and getattr(dense, name) != getattr(moe, name)
    ]
    if changed:
        raise ConfigError("upcycling changes the feed-forward layers only, but these differ:\n" + "\n".join(changed))
    method.check(dense, moe)


def upcycled_tensors(source: TensorSource, moe: ModelConfig, method: Method, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the MoE model by canonical name, one layer's feed-forward at a time."""
    for name in source.specs:
        if ".mlp.linear_fc" not in name:
            yield name, source.read(name)
    for layer, is_moe in enumerate(moe.moe_layer_pattern):
        prefix = f"decoder.layers.{layer}.mlp"
        ffn = _feed_forward(source, prefix)
        if is_moe:
            yield from _moe_layer(prefix, ffn, moe, method, seed)
        else:
            yield from _named(prefix, ffn)


def _feed_forward(source: TensorSource, prefix: str) -> FeedForward:
    *weights, fc1_bias, fc2_bias = _names(prefix)
    fc1, fc2 = map(source.read, weights)
    biases = (source.read(name) if name in source.specs else None for name in (fc1_bias, fc2_bias))
    return FeedForward(fc1, fc2, *biases)


def _moe_layer(
    prefix: str, ffn: FeedForward, moe: ModelConfig, method: Method, seed: int
) -> Iterator[tuple[str, Tensor]]:
    for expert, network in enumerate(method.experts(ffn, moe)):
        yield from _named(f"{prefix}.experts.{expert}", network)
    if moe.moe_shared_expert_intermediate_size is not None:
        yield from _named(f"{prefix}.shared_experts", method.shared(ffn, moe))
    if moe.moe_shared_expert_gate:
        yield f"{prefix}.shared_experts.gate_weight", torch.zeros(1, moe.hidden_size)
    if moe.moe_router_enable_expert_bias:
        yield f"{prefix}.router.expert_bias", torch.zeros(moe.num_moe_experts or 0)
    if isinstance(moe.moe_router_noise, LearnedNoise):
        yield f"{prefix}.router.noise_weight", torch.zeros(moe.num_moe_experts or 0, moe.hidden_size)
    name = f"{prefix}.router.weight"
    assert moe.num_moe_experts is not None
    generator = torch.Generator().manual_seed(seed_from_name(seed, name))
    yield name, torch.empty(moe.num_moe_experts, moe.hidden_size).normal_(0.0, moe.init_method_std, generator=generator)


def _named(prefix: str, network: FeedForward) -> Iterator[tuple[str, Tensor]]:
    tensors = (network.fc1, network.fc2, network.fc1_bias, network.fc2_bias)
    for name, tensor in zip(_names(prefix), tensors, strict=True):
        if tensor is not None:
            yield name, tensor


def _names(prefix: str) -> tuple[str, ...]:
    """The tensors of a feed-forward network in the order of FeedForward's fields."""
    return tuple(f"{prefix}.linear_{layer}.{kind}" for kind in ("weight", "bias") for layer in ("fc1", "fc2"))
