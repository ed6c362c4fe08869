"""Writes a model as a Megatron checkpoint or a Hugging Face directory, wherever its tensors come from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.checkpoint.hf_directory import HuggingFaceSink
from megatron_ext.checkpoint.streams import MegatronSink, TensorSink
from megatron_ext.checkpoint.tokenizer_files import says_of_tokens
from megatron_ext.config import to_mapping
from megatron_ext.model_io.compare import Verification
from megatron_ext.model_io.engine import TensorTask, followed_by, stored_dtype, target_specs, tasks_to_hf
from megatron_ext.model_io.huggingface.companion_files import write_export
from megatron_ext.model_io.huggingface.model_card import write_model_card
from megatron_ext.model_io.model_to_write import ModelToWrite
from megatron_ext.model_io.stacking import stacked
from megatron_ext.model_io.transfer import transfer

Progress = Callable[[int, int], None]
"""Told (bytes written, bytes in all) as a model is written."""


@dataclass(frozen=True)
class Examined:
    """What an examination of the output found."""

    lines: Sequence[str]
    """For people, and for the model card."""
    verification: Verification | None = None


Check = Callable[[Path], Examined | None]
"""Examines what was written, still at its unfinished place; what it raises keeps it from getting its name."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Output:
    """Where and how a model is written."""

    target: Path
    dtype: torch.dtype | None = None
    """None keeps each tensor's."""
    shard_bytes: int = 5 * 10**9
    """Size of a safetensors file at most, but for a tensor that is larger alone."""
    workers: int = 1
    """Threads. The result does not depend on them."""
    force: bool = False
    """Replace an existing target."""
    name: str | None = None
    """Of the model, in its card. Default: the target's."""
    progress: Progress = lambda done, total: None


@dataclass(frozen=True)
class Written:
    """What was written."""

    tensors: int
    bytes: int
    """Of tensors."""
    verification: Verification | None


def write_hugging_face(
    content: ModelToWrite, architecture: Architecture, why: str, output: Output, check: Check
) -> Written:
    """Write `content` as a model of `architecture`, `why` going into its card.

    Raises:
        ConversionError, CheckpointError: nothing that looks complete is left behind.
    """
    to_hf = list(tasks_to_hf(architecture.weights, content.model))
    specs = target_specs(iter(stacked(to_hf, architecture, content.model)), content, output.dtype)
    tasks = stacked(followed_by(content.tasks, to_hf), architecture, content.model)
    sink = HuggingFaceSink(
        output.target, specs, shard_bytes=output.shard_bytes, force=output.force, inputs=content.inputs
    )
    with sink:
        write_export(sink.partial, architecture, content, specs)
        examined = _fill(sink, tasks, content, output, check)
        figures = examined.lines if examined else None
        write_model_card(sink.partial, output.name or sink.target.name, architecture, why, content, figures)
    return _written(sink, examined)


def write_megatron(content: ModelToWrite, output: Output, check: Check) -> Written:
    """Write `content` as a Megatron checkpoint at step 0.

    Raises:
        ConversionError, CheckpointError: nothing that looks complete is left behind.
    """
    specs = {
        name: replace(spec, dtype=stored_dtype(name, spec.dtype, output.dtype)) for name, spec in content.specs.items()
    }
    run = {**content.run, "model": to_mapping(content.model)}
    tokenizer = content.tokenizer
    if tokenizer is None and content.companion_files is not None and says_of_tokens(content.companion_files):
        tokenizer = content.companion_files  # for a later export; nothing here reads it
    sink = MegatronSink(output.target, specs, run, tokenizer=tokenizer, force=output.force, inputs=content.inputs)
    with sink:
        examined = _fill(sink, content.tasks, content, output, check)
    return _written(sink, examined)


def _written(sink: TensorSink, examined: Examined | None) -> Written:
    return Written(len(sink.specs), sink.total_bytes, examined.verification if examined else None)


def require_place(to: str, output: Output, inputs: Sequence[Path]) -> None:
    """Raise ConversionError where `output` may not be written, before anything is computed for it."""
    if to == "hf":
        HuggingFaceSink(output.target, {}, force=output.force, inputs=inputs)
    else:
        MegatronSink(output.target, {}, {}, force=output.force, inputs=inputs)


def _fill(
    sink: TensorSink, tasks: Sequence[TensorTask], content: ModelToWrite, output: Output, check: Check
) -> Examined | None:
    """Write every tensor, complete the output at its unfinished place, and examine it there."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        output.progress(done, sink.total_bytes)

    transfer(tasks, content.stream, sink, advance, workers=output.workers)
    sink.finish()
    return check(sink.partial)
