"""Merges checkpoints: which ones, into what, and how the result does on text beside its parts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import Tensor

from megatron_ext.architectures.registry import architecture_for
from megatron_ext.checkpoint.store import complete_checkpoints
from megatron_ext.config.base import config
from megatron_ext.conversion.engine import copies
from megatron_ext.conversion.sources import Checkpoint, is_hugging_face, open_checkpoint, streams_of_one_shape
from megatron_ext.conversion.verify import Verification, checkpoint_logits, perplexity
from megatron_ext.conversion.write import DTYPES, Output, Progress, Written, write_hugging_face, write_megatron
from megatron_ext.errors import ConfigError
from megatron_ext.merging.merge import AnyMerge, Linear
from megatron_ext.merging.stream import Merged


@config
class AverageOptions:
    """Options of this command."""

    sources: list[str] = Field(min_length=1)
    """Models of one shape: Megatron checkpoints or Hugging Face directories; with --last one folder of checkpoints."""
    target: str
    """Directory to write."""
    to: Literal["megatron", "hf"] = "megatron"
    """Format of the target."""
    last: int | None = Field(default=None, ge=2)
    """Average the last n checkpoints of the one directory that is given."""
    method: AnyMerge = Field(default_factory=Linear)
    """How the models are merged."""
    base: str | None = None
    """The model that task vectors are differences to; for task_arithmetic, ties and dare."""
    seed: int = Field(default=1234, ge=0)
    """Seed of what dare drops."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Convert the weights. Default: the first source's."""
    text: str | None = None
    """Text or prepared dataset to measure the perplexity on. Default: built-in sentences."""
    tokenizer: str | None = None
    """Tokenizer for the text. Default: the first source's."""
    logits: bool = True
    """Measure the perplexity of every source and of the result; each is loaded in fp32. --no-logits leaves that out."""
    workers: int = Field(default=2, ge=1)
    """Threads. The result does not depend on them."""
    force: bool = False
    """Replace an existing target."""


@dataclass(frozen=True)
class Averaged:
    """What was merged, and how it does."""

    written: Written
    perplexities: dict[str, float]
    """Of each source, and of the result under the name of the target; empty where none was to be measured."""


def average(
    options: AverageOptions, batches: Sequence[Tensor], progress: Progress = lambda done, total: None
) -> Averaged:
    """Merge the sources and write the result.

    Args:
        batches: token ids [B, S] to measure perplexities on; none for none.

    Raises:
        ConfigError: the models are not of one shape, or do not suit the method.
        ConversionError, CheckpointError: nothing that looks complete is left behind.
    """
    opened = [open_checkpoint(path) for path in sources_of(options)]
    base = _base(options)
    models = [*opened, *([base] if base else [])]
    streams = streams_of_one_shape(models)
    merged = Merged(options.method, streams[: len(opened)], base=streams[-1] if base else None, seed=options.seed)
    content = replace(
        opened[0].content,
        tasks=list(copies(merged)),
        specs=merged.specs,
        stream=merged,
        inputs=[one.directory for one in models],
    )
    output = Output(
        Path(options.target),
        DTYPES.get(options.dtype or ""),
        workers=options.workers,
        force=options.force,
        progress=progress,
    )
    directories = [one.directory for one in opened] if batches else []
    measured = {str(path): perplexity(checkpoint_logits(path, batches), batches) for path in directories}

    def examine(partial: Path) -> Verification | None:
        if batches:
            measured[options.target] = perplexity(checkpoint_logits(partial, batches), batches)
        return None

    if options.to == "hf":
        architecture, why = architecture_for(content.model)
        return Averaged(write_hugging_face(content, architecture, why, output, examine), measured)
    return Averaged(write_megatron(content, output, examine), measured)


def sources_of(options: AverageOptions) -> list[Path]:
    """The checkpoints to merge, oldest first.

    Raises:
        ConfigError: there are too few.
    """
    paths = [Path(source) for source in options.sources]
    if options.last is None:
        if len(paths) < 2 and not options.method.needs_base:
            raise ConfigError("sources: give two models or more, or --last N with a directory of checkpoints")
        return paths
    if len(paths) != 1 or is_hugging_face(paths[0]):
        raise ConfigError("--last takes one directory of Megatron checkpoints")
    found = complete_checkpoints(paths[0])
    if len(found) < options.last:
        raise ConfigError(f"--last {options.last}: {paths[0]} holds {len(found)} checkpoints")
    return found[-options.last :]


def _base(options: AverageOptions) -> Checkpoint | None:
    if options.method.needs_base != (options.base is not None):
        needed = "needs --base" if options.method.needs_base else "works without --base"
        raise ConfigError(f"--method {options.method.kind} {needed}")
    return open_checkpoint(options.base) if options.base is not None else None
