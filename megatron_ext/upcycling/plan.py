"""What an upcycling will do, settled from its options and sources before anything is computed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_ext.config import ModelConfig, check_model
from megatron_ext.config.model_fields import EXPERT_FIELDS, TRAINING_FIELDS
from megatron_ext.errors import ConfigError
from megatron_ext.model_io.one_tokenizer import require_one_tokenizer
from megatron_ext.model_io.open import Checkpoint, open_checkpoint, streams_of_one_shape
from megatron_ext.model_io.write import DTYPES
from megatron_ext.upcycling.depth import deepened_model, parse_layers
from megatron_ext.upcycling.methods.base import Method
from megatron_ext.upcycling.options import UpcycleOptions

# Everything but the feed-forward layers, and what only training reads, must stay what it is.
_MAY_CHANGE = EXPERT_FIELDS | TRAINING_FIELDS | {"transformer_overrides"}

TOLERANCE = 1e-5
"""Of logits, where the function is kept: sums in another order measure 1e-7 to 1e-6 of their scale in fp32."""

_OF_EXPERTS = (
    "method topk expert_size shared_expert_size shared_expert_gate gating_normalization score_function expert_bias "
    "router_bias pre_softmax norm_topk_prob scaling_factor first_k_dense layer_freq router_init router_std"
).split()
"""Options that say something about experts."""


@dataclass(frozen=True)
class UpcyclePlan:
    """What an upcycling will do."""

    options: UpcycleOptions
    checkpoints: Sequence[Checkpoint]
    dense: ModelConfig
    """The dense model, its layers repeated if that was asked for."""
    moe: ModelConfig
    """The model to make; where no experts are added, `dense` itself."""
    dtype: torch.dtype
    rounds: bool
    """Whether that dtype holds less than the source's."""
    inexact: str | None
    """Why the MoE model will not compute what `dense` does with weights of that dtype; None if it will."""

    @property
    def method(self) -> Method:
        """How experts are made."""
        return self.options.method

    @property
    def adds_experts(self) -> bool:
        """Whether it makes a MoE model; otherwise a deeper one of the source's kind."""
        return self.options.num_experts is not None

    @property
    def expectation(self) -> str:
        """What becomes of the function, for people."""
        if self.inexact is not None:
            return f"changes: {self.inexact}"
        of = " of the model with these layers" if self.options.layers else ""
        rounded = f", with weights rounded to {str(self.dtype).removeprefix('torch.')}" if self.rounds else ""
        return f"kept{of}, up to the rounding of fp32{rounded}"


def make_plan(options: UpcycleOptions) -> UpcyclePlan:
    """Open the sources and settle what will be made of them.

    Raises:
        ConfigError: there is no such model, or the method cannot make it of those.
        ConversionError, CheckpointError: a source cannot be read.
    """
    options = replace(options, target=_named(options.target))
    _check_options(options)
    checkpoints = [open_checkpoint(source) for source in options.sources]
    _check_sources(checkpoints, options)
    streams_of_one_shape(checkpoints)
    require_one_tokenizer(checkpoints)
    shallow = checkpoints[0].model
    dense = deepened_model(shallow, parse_layers(options.layers, shallow.num_layers)) if options.layers else shallow
    moe = options.model_of(dense)
    if options.num_experts is not None:
        check_models(dense, moe, options.method)
    own = checkpoints[0].tensors.specs["decoder.layers.0.self_attention.linear_proj.weight"].dtype
    dtype = DTYPES.get(options.dtype or "", own)
    inexact = options.method.inexact(moe, dtype) if options.num_experts is not None else None
    if inexact is not None and options.tolerance is not None:
        raise ConfigError(f"tolerance = {options.tolerance}: has no effect, since the function changes: {inexact}")
    rounds = dtype != own and dtype.itemsize <= own.itemsize
    return UpcyclePlan(options, checkpoints, dense, moe, dtype, rounds, inexact)


def _named(target: str) -> str:
    """The target without a slash at its end, or the name that `.` and `..` stand for.

    Raises:
        ConfigError: it has none, and nothing can stand beside it.
    """
    path = Path(target) if Path(target).name not in ("", "..") else Path(target).resolve()
    if not target or not path.name:
        raise ConfigError(f"target = {target!r}: give the name of a directory to write")
    return str(path)


def _check_options(options: UpcycleOptions) -> None:
    """Raise ConfigError where an option would have no effect, or lacks another."""
    clusters = options.router_init == "activations"
    if options.num_experts is None:
        if options.layers is None:
            raise ConfigError("num_experts: required, but where --layers alone makes a deeper model")
        defaults = UpcycleOptions(sources=[""], target="")
        for name in _OF_EXPERTS:
            if (value := getattr(options, name)) != getattr(defaults, name):
                raise ConfigError(f"{name} = {value}: has no effect without num_experts; remove it")
    if clusters and options.text is None:
        raise ConfigError("router_init = activations: needs --text, enough of it for a few hundred tokens an expert")
    if clusters and options.router_std is not None:
        raise ConfigError(f"router_std = {options.router_std}: has no effect with router_init = activations; remove it")
    idle = {
        "text": not options.logits and not clusters and "--no-logits",
        "tokenizer": not options.logits and not clusters and "--no-logits",
        "figures": (not options.logits and "--no-logits") or (options.check and "--check"),
        "tolerance": not options.logits and "--no-logits",
    }
    for name, why in idle.items():
        if why and (value := getattr(options, name)) is not None:
            raise ConfigError(f"{name} = {value}: has no effect with {why}; remove it")


def _check_sources(checkpoints: Sequence[Checkpoint], options: UpcycleOptions) -> None:
    """Raise ConfigError where there are too few or too many sources, or they are MoE models already."""
    if options.num_experts is None:
        if len(checkpoints) > 1:
            raise ConfigError(f"sources: {len(checkpoints)} given; without num_experts one is made deeper")
        return
    options.method.check_sources(len(checkpoints), options.num_experts)
    for one in checkpoints:
        if one.model.is_moe:
            raise ConfigError(f"{one.directory}: the source is a MoE model already; upcycling starts from a dense one")


def check_models(dense: ModelConfig, moe: ModelConfig, method: Method) -> None:
    """Raise ConfigError where `moe` is not `dense` with experts, or the method cannot make it."""
    if not moe.is_moe:
        raise ConfigError(
            f"first_k_dense = {moe.moe_first_k_dense}, layer_freq = {moe.moe_layer_freq}: leave none of the "
            f"{moe.num_layers} layers to become MoE"
        )
    method.check(dense, moe)
    check_model(moe, source="the upcycled model")
    changed = [
        f"  {name}: {getattr(dense, name)!r} in the source, {getattr(moe, name)!r} in the target"
        for name in ModelConfig.__dataclass_fields__
        if name not in _MAY_CHANGE and getattr(dense, name) != getattr(moe, name)
    ]
    if changed:
        raise ConfigError("upcycling changes the feed-forward layers only, but these differ:\n" + "\n".join(changed))
