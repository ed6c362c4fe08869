"""Merges checkpoints: which ones, into what, and how the result does on text beside its parts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ext.architectures.registry import architecture_for
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.checkpoint.find import newest_checkpoints
from megatron_ext.checkpoint.state_file import TrainingState
from megatron_ext.errors import ConfigError, ConversionError
from megatron_ext.merging.options import AverageOptions
from megatron_ext.merging.stream import Merged
from megatron_ext.model_io.compare import checkpoint_logits, perplexity, require_memory
from megatron_ext.model_io.engine import copies
from megatron_ext.model_io.model_to_write import ModelToWrite
from megatron_ext.model_io.one_tokenizer import require_one_tokenizer
from megatron_ext.model_io.open import (
    Checkpoint,
    is_hugging_face,
    open_checkpoint,
    streams_of_one_shape,
    warn_of_what_stays,
)
from megatron_ext.model_io.text import comparison_batches
from megatron_ext.model_io.write import (
    DTYPES,
    Check,
    Examined,
    Output,
    Progress,
    Written,
    require_place,
    write_hugging_face,
    write_megatron,
)


@dataclass(frozen=True)
class Averaged:
    """What was merged, and how it does."""

    written: Written
    perplexities: dict[str, float]
    """Of each source, and of the result under the name of the target; empty where none was to be measured."""


def average(options: AverageOptions, progress: Progress = lambda done, total: None) -> Averaged:
    """Merge the sources, write the result and measure perplexities.

    Raises:
        ConfigError: the models are not of one shape, or do not suit the method.
        DataError: there is no such text.
        ConversionError, CheckpointError: nothing that looks complete is left behind.
    """
    _check_options(options)
    paths = sources_of(options)
    options.method.check(len(paths))
    opened = [open_checkpoint(path) for path in paths]
    base = open_checkpoint(options.base) if options.base is not None else None
    warn_of_what_stays(opened[0])
    models = [*opened, *([base] if base else [])]
    streams = streams_of_one_shape(models)
    require_one_tokenizer(models)
    seed = 1234 if options.seed is None else options.seed
    merged = Merged(
        options.method,
        streams[: len(opened)],
        base=streams[-1] if base else None,
        seed=seed,
        vocab_size=opened[0].model.vocab_size,
    )
    output = Output(
        Path(options.target),
        DTYPES.get(options.dtype or ""),
        workers=options.workers,
        force=options.force,
        progress=progress,
    )
    content = _content(options, opened, merged, [one.directory for one in models])
    require_place(options.to, output, content.inputs)
    chosen = _class_of(options, opened[0]) if options.to == "hf" else None
    measured, examine = _measurement(options, opened)
    if chosen is not None:
        return Averaged(write_hugging_face(content, *chosen, output, examine), measured)
    return Averaged(write_megatron(content, output, examine), measured)


def _check_options(options: AverageOptions) -> None:
    """Raise ConfigError where an option would have no effect, or lacks another."""
    kind = options.method.kind
    if options.method.needs_base != (options.base is not None):
        raise ConfigError(f"--method {kind} {'needs --base' if options.method.needs_base else 'works without --base'}")
    idle = {
        "seed": kind != "dare" and f"--method {kind}",
        "hf_class": options.to != "hf" and "--to megatron",
        "text": not options.logits and "--no-logits",
        "tokenizer": not options.logits and "--no-logits",
    }
    for name, why in idle.items():
        if why and getattr(options, name) is not None:
            raise ConfigError(f"{name} = {getattr(options, name)}: has no effect with {why}; remove it")


def _content(
    options: AverageOptions, opened: Sequence[Checkpoint], merged: Merged, inputs: Sequence[Path]
) -> ModelToWrite:
    """The merged model. Of several checkpoints of one run it carries the newest one's record of training."""
    newest = opened[-1].content
    content = replace(newest, tasks=list(copies(merged)), specs=merged.specs, stream=merged, inputs=inputs)
    names = ", ".join(one.directory.name for one in opened)
    beside_base = f" beside {Path(options.base).name}" if options.base else ""
    content = replace(content, model=opened[0].model, made_of=f"{options.method.kind} of {names}{beside_base}")
    return content if options.last is not None else replace(content, run={}, state=TrainingState())


def _class_of(options: AverageOptions, first: Checkpoint) -> tuple[Architecture, str]:
    if first.architecture is not None and options.hf_class is None:
        return first.architecture, f"{first.architecture.hf_class}, as before"
    return architecture_for(first.model, options.hf_class)


def _measurement(options: AverageOptions, opened: Sequence[Checkpoint]) -> tuple[dict[str, float], Check]:
    """The perplexity of every source, and how that of the result joins them."""
    if not options.logits:
        return {}, lambda partial: None
    first = opened[0]
    require_memory(first.model, options.target)
    batches = comparison_batches(first.directory, options.text, options.tokenizer)

    def measure(path: Path) -> float:
        logits = checkpoint_logits(path, batches, trust_remote_code=options.trust_remote_code)
        if math.isnan(value := perplexity(logits, batches)):
            raise ConversionError(f"{path}: its logits are not numbers; is it a model that diverged?")
        return value

    measured = {str(one.directory): measure(one.directory) for one in opened}

    def examine(partial: Path) -> Examined:
        measured[options.target] = measure(partial)
        return Examined([f"perplexity {value:10.4g}  {Path(name).name}" for name, value in measured.items()])

    return measured, examine


def sources_of(options: AverageOptions) -> list[Path]:
    """The checkpoints to merge, oldest first.

    Raises:
        ConfigError: there are too few.
    """
    paths = [Path(source) for source in options.sources]
    if options.last is None:
        return paths
    if len(paths) != 1 or is_hugging_face(paths[0]):
        raise ConfigError("--last takes one directory of Megatron checkpoints")
    found = newest_checkpoints(paths[0], options.last)
    if len(found) < options.last:
        raise ConfigError(f"--last {options.last}: {paths[0]} holds {len(found)} checkpoints")
    return found
