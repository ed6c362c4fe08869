"""Converts a checkpoint: Megatron or Hugging Face to either, one process, tensor by tensor, complete or not at all."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from megatron_ext.architectures.base import Architecture
from megatron_ext.architectures.registry import architecture_for
from megatron_ext.checkpoint.safetensors import HuggingFaceSink
from megatron_ext.checkpoint.tensors import MegatronSink, TensorSink
from megatron_ext.config import ModelConfig, to_mapping
from megatron_ext.conversion.engine import Task, copies, target_specs, tasks_to_hf
from megatron_ext.conversion.export import write_export
from megatron_ext.conversion.figures import lines_of
from megatron_ext.conversion.model_card import write_model_card
from megatron_ext.conversion.sources import Checkpoint, is_hugging_face, open_checkpoint
from megatron_ext.conversion.transfer import transfer
from megatron_ext.conversion.verify import Comparison, Verification, comparison_input
from megatron_ext.conversion.verify import verify as compare
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import ConversionError

Progress = Callable[[int, int], None]
"""Told (bytes written, bytes in all) as a conversion proceeds."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Conversion:
    """What a conversion did."""

    direction: str
    """`to Hugging Face` or `to Megatron`."""
    why: str
    """The architecture, and why this one."""
    architecture: Architecture | None
    """Of the Hugging Face side; None between two Megatron checkpoints."""
    model: ModelConfig
    tensors: int
    """Tensors written."""
    bytes: int
    """Bytes of tensors written."""
    verification: Verification | None = None


@dataclass(frozen=True)
class _Order:
    """What is to be done, apart from the source and the direction."""

    target: Path
    dtype: torch.dtype | None
    tokenizer: Path | None
    shard_bytes: int
    workers: int
    force: bool
    verify: Comparison | None
    name: str
    progress: Progress


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Literal["megatron", "hf"] | None = None,
    hf_class: str | None = None,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    shard_bytes: int = 5 * 10**9,
    workers: int = 1,
    force: bool = False,
    verify: Comparison | None = None,
    name: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Convert `source` to `target`, by default to the other format.

    Args:
        to: format of the target, the source's own included: another dtype, or another Hugging Face class.
        hf_class: class of a Hugging Face target. Default: the source's own, else the first that computes the model.
        dtype: `fp32`, `bf16` or `fp16`; None keeps what the source has.
        tokenizer: directory whose tokenizer goes into a Hugging Face export. Default: the source's own.
        shard_bytes: size of a safetensors file at most, but for a tensor that is larger alone.
        workers: threads. The result does not depend on them.
        force: replace an existing target.
        verify: compare the result with the source before it gets its name.
        name: what the model card of a Hugging Face export calls the model. Default: the target's own name.

    Raises:
        ConversionError, CheckpointError: nothing that looks complete is left behind.
    """
    opened = open_checkpoint(source)
    own = Path(tokenizer) if tokenizer is not None else opened.tokenizer
    verify = None if verify is None else replace(verify, tokenizer=verify.tokenizer or own)
    name = name or Path(target).name
    order = _Order(Path(target), _DTYPES.get(dtype or ""), own, shard_bytes, workers, force, verify, name, progress)
    if verify is not None:
        comparison_input(opened.directory, verify)  # what stands in its way is found before the work
    if to == "megatron" and hf_class is not None:
        raise ConversionError(f"--hf-class {hf_class}: a Megatron checkpoint has no Hugging Face class")
    if to == "hf" or hf_class is not None or (to is None and not is_hugging_face(source)):
        if tokenizer is not None and Tokenizer(tokenizer).vocab_size > opened.model.vocab_size:
            raise ConversionError(f"{tokenizer} has more tokens than the model's vocab_size, {opened.model.vocab_size}")
        return _to_hugging_face(opened, hf_class, order)
    return _to_megatron(opened, order)


def _to_hugging_face(opened: Checkpoint, hf_class: str | None, order: _Order) -> Conversion:
    if opened.architecture is not None and hf_class in (None, opened.architecture.hf_class):
        architecture, why = opened.architecture, f"{opened.architecture.hf_class}, as before"
    else:
        architecture, why = architecture_for(opened.model, hf_class)
    how = order.verify
    if architecture.remote is not None and how is not None and how.logits and not how.trust_remote_code:
        raise ConversionError(
            f"{architecture.hf_class}: its code is in {architecture.remote}; verify weights alone with --no-logits, or "
            "run that code with --trust-remote-code"
        )
    tasks = list(tasks_to_hf(architecture.weights, opened.model))
    specs = target_specs(iter(tasks), opened.tensors, order.dtype)
    sink = HuggingFaceSink(
        order.target, specs, shard_bytes=order.shard_bytes, force=order.force, inputs=[opened.directory]
    )
    with sink:
        write_export(
            sink.partial, architecture, opened.model, specs, tokenizer=order.tokenizer, hf_config=opened.hf_config
        )
        verification = _fill(sink, tasks, opened, order)
        write_model_card(sink.partial, order.name, architecture, why, opened, verification)
    return _summary("to Hugging Face", architecture, why, opened, sink, verification)


def _to_megatron(opened: Checkpoint, order: _Order) -> Conversion:
    tasks = list(copies(opened.tensors))
    specs = target_specs(iter(tasks), opened.tensors, order.dtype)
    run = {**opened.run, "model": to_mapping(opened.model)}
    sink = MegatronSink(
        order.target, specs, run, tokenizer=order.tokenizer, force=order.force, inputs=[opened.directory]
    )
    with sink:
        verification = _fill(sink, tasks, opened, order)
    named = f"config.json names {opened.architecture.hf_class}" if opened.architecture else "Megatron, as before"
    return _summary("to Megatron", opened.architecture, named, opened, sink, verification)


def _fill(sink: TensorSink, tasks: list[Task], opened: Checkpoint, order: _Order) -> Verification | None:
    """Write every tensor, complete the output at its unfinished place, and compare it there with the source."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        order.progress(done, sink.total_bytes)

    transfer(tasks, opened.tensors, sink, advance, workers=order.workers)
    sink.finish()
    if order.verify is None:
        return None
    result = compare(opened.directory, sink.partial, order.verify)
    if not result.passed:
        figures = "\n".join(f"  {line}" for line in lines_of(result))
        raise ConversionError(f"{sink.target}: not written, it would not be the same model:\n{figures}")
    return result


def _summary(
    direction: str,
    architecture: Architecture | None,
    why: str,
    opened: Checkpoint,
    sink: TensorSink,
    verification: Verification | None,
) -> Conversion:
    return Conversion(direction, why, architecture, opened.model, len(sink.specs), sink.total_bytes, verification)
