"""Makes a MoE model out of dense ones: what is read, what is made of it, and the checks before and after."""

from collections.abc import Sequence
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
from megatron_ext.conversion.write import DTYPES, Check, Output, Progress, Written, write_hugging_face, write_megatron
from megatron_ext.errors import ConfigError
from megatron_ext.merging.merge import Linear
from megatron_ext.merging.stream import Merged
from megatron_ext.upcycling.depth import RepeatedLayers, deepened_model, parse_layers
from megatron_ext.upcycling.layers import RouterOf, upcycling_tasks
from megatron_ext.upcycling.method import Draw, Method
from megatron_ext.upcycling.mix import Mix
from megatron_ext.upcycling.options import UpcycleOptions
from megatron_ext.upcycling.router import drawn_router
from megatron_ext.upcycling.sources import Sources

# Everything but the feed-forward layers must stay what it is.
_MAY_CHANGE = {
    name
    for name in ModelConfig.__dataclass_fields__
    if name.startswith("moe_") or name in ("num_moe_experts", "init_method_std", "transformer_overrides")
}


@dataclass(frozen=True)
class Plan:
    """What an upcycling will do."""

    options: UpcycleOptions
    opened: Sequence[Checkpoint]
    dense: ModelConfig
    """The dense model, its layers repeated if that was asked for."""
    moe: ModelConfig
    dtype: torch.dtype
    inexact: str | None
    """Why the MoE model will not compute what the first source does; None if it will."""

    @property
    def method(self) -> Method:
        """How experts are made."""
        return self.options.method


def make_plan(options: UpcycleOptions) -> Plan:
    """Open the sources and settle what will be made of them.

    Raises:
        ConfigError: there is no such model, or the method cannot make it of those.
        ConversionError, CheckpointError: a source cannot be read.
    """
    _check_options(options)
    opened = [open_checkpoint(source) for source in options.sources]
    _check_sources(opened, options)
    shallow = opened[0].model
    dense = deepened_model(shallow, parse_layers(options.layers, shallow.num_layers)) if options.layers else shallow
    moe = options.moe_model(dense)
    check_models(dense, moe, options.method)
    own = opened[0].tensors.specs["decoder.layers.0.mlp.linear_fc1.weight"].dtype
    dtype = DTYPES.get(options.dtype or "", own)
    inexact = "layers are repeated" if options.layers else options.method.inexact(moe, dtype)
    if inexact is None and dtype != own and dtype.itemsize < own.itemsize:
        inexact = f"weights are rounded to {str(dtype).removeprefix('torch.')}"
    return Plan(options, opened, dense, moe, dtype, inexact)


def _check_options(options: UpcycleOptions) -> None:
    """Raise ConfigError where an option would have no effect, or lacks another."""
    clusters = options.router_init == "activations"
    if clusters and options.text is None:
        raise ConfigError("router_init = activations: needs --text, enough of it for a few hundred tokens an expert")
    if clusters and options.router_std is not None:
        raise ConfigError(f"router_std = {options.router_std}: has no effect with router_init = activations; remove it")
    for name in ("text", "tokenizer", "figures"):
        if getattr(options, name) is not None and not options.logits and (name == "figures" or not clusters):
            raise ConfigError(f"{name} = {getattr(options, name)}: has no effect with --no-logits; remove it")


def _check_sources(opened: Sequence[Checkpoint], options: UpcycleOptions) -> None:
    several = options.method.takes_several
    if several != (len(opened) > 1):
        needed = "two or more" if several else "one"
        raise ConfigError(f"sources: {len(opened)} given; --method {options.method.kind} takes {needed}")
    streams_of_one_shape(opened)
    if isinstance(options.method, Mix):
        options.method.check_sources(len(opened), options.num_experts)


def check_models(dense: ModelConfig, moe: ModelConfig, method: Method) -> None:
    """Raise ConfigError where `moe` is not `dense` with experts, or the method cannot make it."""
    if dense.is_moe:
        raise ConfigError("the source is a MoE model already; upcycling starts from a dense one")
    if not moe.is_moe:
        raise ConfigError("the target has no experts; set num_moe_experts")
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
    weights = plan.method.source_weights if isinstance(plan.method, Mix) else None
    return Merged(Linear(weights=weights), streams)


def content_of(plan: Plan, router_of: RouterOf) -> Content:
    """The upcycled model, to be written."""
    streams = dense_streams(plan)
    count, seed = len(streams), plan.options.seed
    tasks = list(upcycling_tasks(plan.dense, plan.moe, plan.method, router_of, sources=count, seed=seed))
    present, asked = streams[0].specs, DTYPES.get(plan.options.dtype or "")
    specs = {
        # What is not made anew keeps its own dtype: some models have norms in fp32 beside weights in bf16.
        name: TensorSpec(shape, stored_dtype(name, present[name].dtype if name in present else plan.dtype, asked))
        for name, shape in model_shapes(plan.moe).items()
    }
    first = plan.opened[0]
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
    )


def output_of(plan: Plan, progress: Progress = lambda done, total: None) -> Output:
    """Where and how the model is written."""
    options = plan.options
    return Output(Path(options.target), workers=options.workers, force=options.force, progress=progress)


def write(plan: Plan, router_of: RouterOf, check: Check, output: Output) -> Written:
    """Write the upcycled model. Routers that normalize are never all equal: their rows are drawn, or distinct clusters.

    Raises:
        ConversionError, CheckpointError: nothing that looks complete is left behind.
    """
    content = content_of(plan, router_of)
    if plan.options.to == "hf":
        architecture, why = architecture_for(plan.moe)
        # The run is the dense model's: a card would pass it off as this one's.
        return write_hugging_face(replace(content, run={}), architecture, why, output, check)
    return write_megatron(content, output, check)
