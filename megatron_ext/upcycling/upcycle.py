"""Makes a MoE model out of dense ones: what is read, what is made of it, and the checks before and after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.architectures.registry import architecture_for
from megatron_ext.checkpoint.shapes import model_shapes
from megatron_ext.checkpoint.tensors import TensorSource, TensorSpec
from megatron_ext.config import ModelConfig, check_model
from megatron_ext.conversion.content import Content
from megatron_ext.conversion.engine import stored_dtype
from megatron_ext.conversion.sources import Checkpoint, open_checkpoint, streams_of_one_shape
from megatron_ext.conversion.write import DTYPES, Check, Output, Written, write_hugging_face, write_megatron
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.merging.merge import Linear
from megatron_ext.merging.stream import Merged
from megatron_ext.upcycling.depth import RepeatedLayers, deepened_model, parse_layers
from megatron_ext.upcycling.layers import RouterOf, upcycling_tasks
from megatron_ext.upcycling.method import Draw, Method
from megatron_ext.upcycling.options import UpcycleOptions
from megatron_ext.upcycling.router import drawn_router
from megatron_ext.upcycling.sources import Sources

# Everything but the feed-forward layers must stay what it is.
_MAY_CHANGE = {
    name
    for name in ModelConfig.__dataclass_fields__
    if name.startswith("moe_") or name in ("num_moe_experts", "init_method_std", "transformer_overrides")
}


TOLERANCE = 1e-5
"""Of logits, where the function is kept: sums in another order measure 1e-7 to 1e-6 of their scale in fp32."""

_OF_EXPERTS = (
    "method topk expert_size shared_expert_size shared_expert_gate gating_normalization score_function expert_bias "
    "pre_softmax norm_topk_prob scaling_factor first_k_dense layer_freq router_init router_std"
).split()
"""Options that say something about experts."""


@dataclass(frozen=True)
class Plan:
    """What an upcycling will do."""

    options: UpcycleOptions
    opened: Sequence[Checkpoint]
    dense: ModelConfig
    """The dense model, its layers repeated if that was asked for."""
    moe: ModelConfig
    """The model to make; without experts, `dense` itself."""
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
    def expectation(self) -> str:
        """What becomes of the function, for people."""
        if self.inexact is not None:
            return f"changes: {self.inexact}"
        of = " of the model with these layers" if self.options.layers else ""
        rounded = f", with weights rounded to {str(self.dtype).removeprefix('torch.')}" if self.rounds else ""
        return f"kept{of}, up to the rounding of fp32{rounded}"


def make_plan(options: UpcycleOptions) -> Plan:
    """Open the sources and settle what will be made of them.

    Raises:
        ConfigError: there is no such model, or the method cannot make it of those.
        ConversionError, CheckpointError: a source cannot be read.
    """
    options = replace(options, target=_named(options.target))
    _check_options(options)
    opened = [open_checkpoint(source) for source in options.sources]
    if options.num_experts is not None:
        options.method.check_sources(len(opened), options.num_experts)
    elif len(opened) > 1:
        raise ConfigError(f"sources: {len(opened)} given; without num_experts one is deepened")
    for one in opened:
        if one.model.is_moe:
            raise ConfigError(f"{one.directory}: the source is a MoE model already; upcycling starts from a dense one")
    streams_of_one_shape(opened)
    shallow = opened[0].model
    dense = deepened_model(shallow, parse_layers(options.layers, shallow.num_layers)) if options.layers else shallow
    moe = options.model_of(dense)
    if options.num_experts is not None:
        check_models(dense, moe, options.method)
    own = opened[0].tensors.specs["decoder.layers.0.mlp.linear_fc1.weight"].dtype
    dtype = DTYPES.get(options.dtype or "", own)
    inexact = options.method.inexact(moe, dtype) if moe.is_moe else None
    if inexact is not None and options.tolerance is not None:
        raise ConfigError(f"tolerance = {options.tolerance}: has no effect, since the function changes: {inexact}")
    rounds = dtype != own and dtype.itemsize <= own.itemsize
    return Plan(options, opened, dense, moe, dtype, rounds, inexact)


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
            raise ConfigError("num_experts: required, but for a deeper dense model (--layers)")
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


def drawn_routers(plan: Plan) -> RouterOf:
    """Routers drawn from the seed."""
    std = plan.options.router_std or plan.moe.init_method_std

    def router_of(layer: int, draw: Draw) -> Tensor:
        return drawn_router(plan.options.router_init, std, plan.moe, plan.method, draw)

    return router_of


def dense_streams(plan: Plan) -> list[TensorSource]:
    """The tensors of each source, its layers repeated if that was asked for."""
    streams = streams_of_one_shape(plan.opened)
    if not plan.options.layers:
        return streams
    layers = parse_layers(plan.options.layers, plan.opened[0].model.num_layers)
    return [RepeatedLayers(stream, layers) for stream in streams]


def dense_stream(plan: Plan) -> TensorSource:
    """The tensors of the dense model; of several, their average."""
    streams = dense_streams(plan)
    if len(streams) == 1:
        return streams[0]
    return Merged(Linear(weights=plan.method.source_weights), streams, vocab_size=plan.dense.vocab_size)


def content_of(plan: Plan, router_of: RouterOf) -> Content:
    """The upcycled model, to be written."""
    streams = dense_streams(plan)
    present, asked = streams[0].specs, DTYPES.get(plan.options.dtype or "")
    specs = {
        # What is not made anew keeps its own dtype: some models have norms in fp32 beside weights in bf16.
        name: TensorSpec(shape, stored_dtype(name, present[name].dtype if name in present else plan.dtype, asked))
        for name, shape in model_shapes(plan.moe).items()
    }

    def checked_router(layer: int, draw: Draw) -> Tensor:
        return _fit_to_choose(plan, layer, router_of(layer, draw), specs)

    tasks = list(
        upcycling_tasks(plan.dense, plan.moe, plan.method, checked_router, sources=len(streams), seed=plan.options.seed)
    )
    first, names = plan.opened[0], ", ".join(opened.directory.name for opened in plan.opened)
    return Content(
        model=plan.moe,
        tasks=tasks,
        specs=specs,
        stream=Sources(streams, dense_stream(plan)),
        inputs=[opened.directory for opened in plan.opened],
        tokenizer=first.tokenizer,
        hf_config=first.hf_config,
        run=first.run,
        beside=first.content.beside,
        made_of=f"{names}, upcycled by {plan.method.kind}" if plan.moe.is_moe else f"layers of {names}",
    )


def _fit_to_choose(plan: Plan, layer: int, weight_EH: Tensor, specs: Mapping[str, TensorSpec]) -> Tensor:
    """The router's weight, if it tells experts apart once it is stored; those of a set share a row.

    Raises:
        DataError: it does not.
    """
    stored = weight_EH.to(specs[f"decoder.layers.{layer}.mlp.router.weight"].dtype)
    rows = stored[:: plan.method.group_size(plan.moe)]
    if not bool(stored.isfinite().all()) or len(rows.unique(dim=0)) < len(rows):
        what = "--text has too few different tokens" if plan.options.router_init == "activations" else "router_std"
        raise DataError(f"the router of layer {layer} does not tell experts apart in {stored.dtype}: {what}")
    return weight_EH


def write(plan: Plan, router_of: RouterOf, check: Check, output: Output) -> Written:
    """Write the upcycled model.

    Raises:
        ConversionError, CheckpointError, DataError: nothing that looks complete is left behind.
    """
    content = content_of(plan, router_of)
    if plan.options.to == "hf":
        architecture, why = architecture_for(plan.moe)
        # The run is the dense model's: a card would pass it off as this one's.
        return write_hugging_face(replace(content, run={}), architecture, why, output, check)
    return write_megatron(content, output, check)
