"""Converts a checkpoint: Megatron or Hugging Face to either, one process, tensor by tensor, complete or not at all."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_ext.architectures.registry import architecture_for
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.checkpoint.examine import check_checksums
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConversionError
from megatron_ext.files import write_text
from megatron_ext.model_io.compare import Comparison, comparison_input
from megatron_ext.model_io.compare import verify as compare
from megatron_ext.model_io.figures import lines_of
from megatron_ext.model_io.finite import WatchedSource, describe
from megatron_ext.model_io.model_to_write import ModelToWrite
from megatron_ext.model_io.open import Checkpoint, is_hugging_face, open_checkpoint, warn_of_what_stays
from megatron_ext.model_io.recipe import Target, recipe_if_trainable, recipe_path, require_recipe_place
from megatron_ext.model_io.untie import untied
from megatron_ext.model_io.write import (
    DTYPES,
    Check,
    Examined,
    Output,
    Progress,
    Written,
    write_hugging_face,
    write_megatron,
)

log = logging.getLogger(__name__)


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
    written: Written
    recipe: Path | None = None
    """The training configuration beside a Megatron checkpoint."""
    notes: Sequence[str] = ()
    """What it has otherwise than the source's run."""


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
    data: str | Path | None = None,
    untie: bool = False,
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
        data: prepared dataset that the training configuration beside a Megatron target trains on.
        untie: give a model whose embedding is its output layer too an output layer of its own.
        name: what the model card of a Hugging Face export calls the model. Default: the target's own name.

    Raises:
        ConversionError, CheckpointError: nothing that looks complete is left behind.
    """
    opened = untied(open_checkpoint(source)) if untie else open_checkpoint(source)
    warn_of_what_stays(opened)
    own = Path(tokenizer) if tokenizer is not None else opened.tokenizer
    watched = WatchedSource(opened.content.stream)
    content = replace(opened.content, tokenizer=own, stream=watched)
    output = Output(Path(target), DTYPES.get(dtype or ""), shard_bytes, workers, force, name, progress)
    check_checksums(opened.directory, ConversionError)  # the result gets sums of its own: damage would look whole
    to_hf = goes_to_hugging_face(source, to, hf_class)
    if verify is not None:
        verify = replace(verify, tokenizer=verify.tokenizer or own, generation=verify.generation and to_hf)
        comparison_input(opened.directory, verify)  # what stands in its way is found before the work
    check = _check_of(opened, watched, Path(target), verify)
    if to_hf:
        architecture, why = _class_of(opened, hf_class, verify)
        written = write_hugging_face(content, architecture, why, output, check)
        return Conversion("to Hugging Face", why, architecture, opened.model, written)
    return _to_megatron(opened, content, output, check, data)


def _check_of(opened: Checkpoint, watched: WatchedSource, target: Path, verify: Comparison | None) -> Check:
    """What the complete result is looked at with before it gets its name."""

    def check(partial: Path) -> Examined | None:
        if watched.not_finite:
            bad = describe(watched.not_finite, len(watched.specs))
            log.warning("%s: %s: it computes nothing of use", opened.directory, bad)
        return None if verify is None else _verified(opened, partial, target, verify)

    return check


def _to_megatron(
    opened: Checkpoint, content: ModelToWrite, output: Output, check: Check, data: str | Path | None
) -> Conversion:
    """Write a Megatron checkpoint, and beside it a run that trains the model; where a run of ours can."""
    why = f"config.json names {opened.architecture.hf_class}" if opened.architecture else "Megatron, as before"
    made = f"converted from {opened.directory}"
    target = Target(str(output.target), opened.model, made, opened.run, content.tokenizer, data=data)
    recipe, place = recipe_if_trainable(target), recipe_path(output.target)
    if recipe is not None:
        require_recipe_place(place, force=output.force)
    written = write_megatron(content, output, check)
    if recipe is None:
        return Conversion("to Megatron", why, opened.architecture, opened.model, written)
    write_text(place, recipe.text)
    return Conversion("to Megatron", why, opened.architecture, opened.model, written, place, recipe.notes)


def goes_to_hugging_face(source: str | Path, to: str | None, hf_class: str | None) -> bool:
    """Whether a conversion writes a Hugging Face directory: asked for, or by default the format `source` has not."""
    if to == "megatron" and hf_class is not None:
        raise ConversionError(f"--hf-class {hf_class}: a Megatron checkpoint has no Hugging Face class")
    return to == "hf" or (to is None and (hf_class is not None or not is_hugging_face(source)))


def _class_of(opened: Checkpoint, hf_class: str | None, how: Comparison | None) -> tuple[Architecture, str]:
    if opened.architecture is not None and hf_class in (None, opened.architecture.hf_class):
        architecture, why = opened.architecture, f"{opened.architecture.hf_class}, as before"
    else:
        architecture, why = architecture_for(opened.model, hf_class)
    if architecture.remote is not None and how is not None and how.logits and not how.trust_remote_code:
        raise ConversionError(
            f"{architecture.hf_class}: its code is in {architecture.remote}; verify weights alone with --no-logits, or "
            "run that code with --trust-remote-code"
        )
    return architecture, why


def _verified(opened: Checkpoint, partial: Path, target: Path, how: Comparison) -> Examined:
    result = compare(opened.directory, partial, how)
    lines = lines_of(result)
    if not result.passed:
        figures = "\n".join(f"  {line}" for line in lines)
        why = "it would not generate what it computes" if result.same else "it would not be the same model"
        if result.weights.not_finite:
            why = "its weights are no numbers"
        raise ConversionError(f"{target}: not written, {why}:\n{figures}")
    return Examined(lines, result)
