"""The upcycled model: the streams it is read from, the tensors made of them, and its writing."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megatron_ext.architectures.registry import architecture_for
from megatron_ext.canonical.catalogue import model_shapes
from megatron_ext.checkpoint.streams import TensorSource, TensorSpec
from megatron_ext.errors import ConversionError, DataError
from megatron_ext.merging.merge import Linear
from megatron_ext.merging.stream import Merged
from megatron_ext.model_io.engine import stored_dtype
from megatron_ext.model_io.finite import WatchedSource, describe
from megatron_ext.model_io.model_to_write import ModelToWrite
from megatron_ext.model_io.open import streams_of_one_shape
from megatron_ext.model_io.write import DTYPES, Check, Examined, Output, Written, write_hugging_face, write_megatron
from megatron_ext.upcycling.depth import RepeatedLayers, parse_layers
from megatron_ext.upcycling.layers import RouterOf, copied, upcycling_tasks
from megatron_ext.upcycling.methods.base import Draw
from megatron_ext.upcycling.plan import UpcyclePlan
from megatron_ext.upcycling.router import drawn_router
from megatron_ext.upcycling.sources import Sources


def drawn_routers(plan: UpcyclePlan) -> RouterOf:
    """Routers drawn from the seed."""
    std = plan.options.router_std or plan.moe.init_method_std

    def router_of(layer: int, draw: Draw) -> Tensor:
        return drawn_router(plan.options.router_init, std, plan.moe, plan.method, draw)

    return router_of


def dense_streams(plan: UpcyclePlan) -> list[TensorSource]:
    """The tensors of each source, its layers repeated if that was asked for."""
    streams = streams_of_one_shape(plan.checkpoints)
    if not plan.options.layers:
        return streams
    layers = parse_layers(plan.options.layers, plan.checkpoints[0].model.num_layers)
    return [RepeatedLayers(stream, layers) for stream in streams]


def dense_stream(plan: UpcyclePlan) -> TensorSource:
    """The tensors of the dense model; of several, their average."""
    streams = dense_streams(plan)
    if len(streams) == 1:
        return streams[0]
    return Merged(Linear(weights=plan.method.source_weights), streams, vocab_size=plan.dense.vocab_size)


def content_of(plan: UpcyclePlan, router_of: RouterOf) -> ModelToWrite:
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

    if plan.adds_experts:
        made = upcycling_tasks(
            plan.dense, plan.moe, plan.method, checked_router, sources=len(streams), seed=plan.options.seed
        )
    else:
        made = map(copied, specs)
    first, names = plan.checkpoints[0], ", ".join(checkpoint.directory.name for checkpoint in plan.checkpoints)
    return ModelToWrite(
        model=plan.moe,
        tasks=list(made),
        specs=specs,
        stream=Sources(streams, dense_stream(plan)),
        inputs=[checkpoint.directory for checkpoint in plan.checkpoints],
        tokenizer=first.tokenizer,
        hf_config=first.hf_config,
        run=first.run,
        companion_files=first.content.companion_files,
        made_of=f"{names}, upcycled by {plan.method.kind}" if plan.adds_experts else f"layers of {names}",
    )


def _fit_to_choose(plan: UpcyclePlan, layer: int, weight_EH: Tensor, specs: Mapping[str, TensorSpec]) -> Tensor:
    """The router's weight, if it tells experts apart once it is stored; those of a set share a row.

    Raises:
        DataError: it does not.
    """
    stored = weight_EH.to(specs[f"decoder.layers.{layer}.mlp.router.weight"].dtype)
    rows = stored[:: plan.method.group_size(plan.moe)]
    if not bool(stored.isfinite().all()) or len(rows.unique(dim=0)) < len(rows):
        clusters = plan.options.router_init == "activations"
        why = "--text has too few different tokens" if clusters else "router_std is too small for that"
        raise DataError(f"the router of layer {layer} does not tell experts apart in {stored.dtype}: {why}")
    return weight_EH


def write(plan: UpcyclePlan, router_of: RouterOf, check: Check, output: Output) -> Written:
    """Write the upcycled model.

    Raises:
        ConversionError, CheckpointError, DataError: nothing that looks complete is left behind.
    """
    content = content_of(plan, router_of)
    watched = WatchedSource(content.stream)
    content = replace(content, stream=watched)

    def check_numbers(partial: Path) -> Examined | None:
        if watched.not_finite:
            names = {name.partition("/")[2] for name in watched.not_finite}
            found = describe(names, len(plan.checkpoints[0].tensors.specs))
            raise ConversionError(
                f"{', '.join(plan.options.sources)}: {found}; take a checkpoint from before it diverged"
            )
        return check(partial)

    if plan.options.to == "hf":
        architecture, why = architecture_for(plan.moe)
        # The run is the dense model's: a card would pass it off as this one's.
        return write_hugging_face(replace(content, run={}), architecture, why, output, check_numbers)
    return write_megatron(content, output, check_numbers)
