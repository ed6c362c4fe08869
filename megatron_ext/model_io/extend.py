"""Adds tokens to a model: to its tokenizer, and rows to its embeddings, each the mean of what its text was before."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.canonical.catalogue import EMBEDDING, OUTPUT
from megatron_ext.checkpoint.examine import check_checksums
from megatron_ext.checkpoint.find import checkpoint_name, find_checkpoint
from megatron_ext.checkpoint.streams import TensorSource
from megatron_ext.checkpoint.tokenizer_files import (
    FAST_FILE,
    TEMPLATE_FOLDERS,
    TOKENIZER_FILES,
    TOKENIZER_FOLDER,
    has_tokenizer,
)
from megatron_ext.config import ModelConfig
from megatron_ext.data.tokenizer import Tokenizer, read_names
from megatron_ext.data.tokenizer.added import Added, write_extended
from megatron_ext.errors import ConversionError
from megatron_ext.files import output_place, publish_directory, remove_unfinished, start_directory, write_text, writing
from megatron_ext.locks import exclusive_output
from megatron_ext.model_io.compare import checkpoint_logits, compare_logits, require_memory
from megatron_ext.model_io.engine import copies
from megatron_ext.model_io.figures import logit_lines
from megatron_ext.model_io.model_to_write import ModelToWrite
from megatron_ext.model_io.open import Checkpoint, Repadded, open_checkpoint
from megatron_ext.model_io.options import ExtendOptions
from megatron_ext.model_io.recipe import Target, recipe_if_trainable, recipe_path, require_recipe_place
from megatron_ext.model_io.text import comparison_batches
from megatron_ext.model_io.write import Examined, Output, Progress, require_place, write_hugging_face, write_megatron

_TOLERANCE = 1e-5
"""Of logits, as a share of the largest: a wider output layer may add up in another order."""


@dataclass(frozen=True)
class Extension:
    """What was added, and to what."""

    added: Added
    model: ModelConfig | None
    """The model with the new rows; None where a tokenizer alone was extended."""
    lines: Sequence[str] = ()
    """What the examination of the result found."""
    recipe: Path | None = None
    """The training configuration beside a Megatron checkpoint."""


def extend(options: ExtendOptions, progress: Progress = lambda done, total: None) -> Extension:
    """Write the model, or the tokenizer, `options.source` with new tokens to `options.target`, in its own format.

    Raises:
        DataError: the tokens cannot be added.
        ConversionError, CheckpointError: nothing that looks complete is left behind.
    """
    source, tokens = Path(options.source), tokens_of(options)
    if not _is_model(source):
        if options.tokenizer is not None:
            raise ConversionError(f"{source}: no model, neither Megatron's nor Hugging Face's, that a tokenizer is for")
        return Extension(_extend_tokenizer(source, options, tokens), None)
    opened = open_checkpoint(source)
    own = Path(options.tokenizer) if options.tokenizer is not None else opened.tokenizer
    if own is None:
        raise ConversionError(f"{opened.directory}: carries no tokenizer to add tokens to; pass --tokenizer DIR")
    check_checksums(opened.directory, ConversionError)
    output = Output(Path(options.target), workers=options.workers, force=options.force, progress=progress)
    require_place("hf" if opened.architecture else "megatron", output, [opened.directory, own])
    with tempfile.TemporaryDirectory() as folder:
        added = write_extended(own, Path(folder), tokens, special=options.special)
        return _write(opened, added, Path(folder), output, options)


def tokens_of(options: ExtendOptions) -> list[str]:
    """The tokens that are named, then those of the file, a line each.

    Raises:
        DataError: the file cannot be read, or has none.
    """
    return [*options.tokens, *(read_names(options.tokens_file) if options.tokens_file is not None else [])]


def _is_model(source: Path) -> bool:
    """Whether there are weights; a tokenizer's folder may have a config.json, too."""
    return any(source.glob("*.safetensors")) or any(source.glob("*.bin")) or find_checkpoint(source) is not None


def _extend_tokenizer(source: Path, options: ExtendOptions, tokens: Sequence[str]) -> Added:
    if not source.is_dir():
        found = "is no folder" if source.exists() else "no such folder"
        raise ConversionError(f"{source}: {found}; give that of a model or of a tokenizer")
    if not has_tokenizer(source):
        raise ConversionError(f"{source}: neither a model (Megatron's or Hugging Face's) nor a tokenizer")
    contents = (FAST_FILE, *TOKENIZER_FILES, *TEMPLATE_FOLDERS, "config.json", "*.py")
    place = output_place(options.target, ConversionError, force=options.force, contents=contents, inputs=[source])
    with exclusive_output(place, "extending a tokenizer"), writing(place):
        partial = start_directory(place)
        try:
            added = write_extended(source, partial, tokens, special=options.special)
        except BaseException:
            remove_unfinished(partial)
            raise
        publish_directory(partial, place, replace=options.force)
    return added


def _write(opened: Checkpoint, added: Added, tokenizer: Path, output: Output, options: ExtendOptions) -> Extension:
    """Write the model beside its extended tokenizer, examined before it gets its name."""
    model = replace(opened.model, vocab_size=max(opened.model.vocab_size, added.vocab_size))
    stream = ExtendedRows(opened.tensors, opened.model, model, added.pieces)
    content = _content(opened, model, stream, tokenizer, output.target)
    before, lines = _logits(opened, options), list[str]()

    def check(partial: Path) -> Examined:
        lines.extend(_examined(partial, stream, added))
        if before is not None:
            lines.extend(_compared(partial, opened.model.vocab_size, added, *before, options))
        return Examined(lines)

    if opened.architecture is not None:
        write_hugging_face(content, opened.architecture, f"{opened.architecture.hf_class}, as before", output, check)
        return Extension(added, model, lines)
    made = f"{opened.directory} with {len(added.ids)} more tokens"
    training = recipe_if_trainable(Target(str(output.target), model, made, content.run, _tokenizer_of(output.target)))
    recipe = recipe_path(output.target) if training is not None else None
    if recipe is not None:
        require_recipe_place(recipe, force=options.force)
    write_megatron(content, output, check)
    if recipe is not None and training is not None:
        write_text(recipe, training.text)
    return Extension(added, model, lines, recipe)


def _content(
    opened: Checkpoint, model: ModelConfig, stream: TensorSource, tokenizer: Path, target: Path
) -> ModelToWrite:
    run = dict(opened.run)
    if "data" in run:
        run["data"] = {**run["data"], "tokenizer": str(_tokenizer_of(target))}
    return replace(
        opened.content,
        model=model,
        tasks=list(copies(stream)),
        specs=stream.specs,
        stream=stream,
        tokenizer=tokenizer,
        companion_files=tokenizer,
        run=run,
        made_of=f"{opened.directory.name}, its vocabulary extended",
    )


def _tokenizer_of(target: Path) -> Path:
    """Where a Megatron checkpoint that is written to `target` has its tokenizer."""
    return target / checkpoint_name(0) / TOKENIZER_FOLDER


class ExtendedRows:
    """A model's tensors with rows for new tokens in its embedding and its output layer."""

    def __init__(
        self, source: TensorSource, before: ModelConfig, after: ModelConfig, pieces: Mapping[int, Sequence[int]]
    ) -> None:
        """`pieces`: the old ids whose mean the row of each new id is."""
        self._padded, self._pieces = Repadded(source, before.vocab_size, after.padded_vocab_size), pieces
        beyond = sorted({piece for of_one in pieces.values() for piece in of_one if piece >= before.vocab_size})
        if beyond:
            raise ConversionError(
                f"the tokenizer makes token {beyond[0]} of a new one, which the model has no row for (vocab_size "
                f"{before.vocab_size}): it is another model's"
            )
        self.specs = self._padded.specs

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        tensor = self._padded.read(name)
        if name in (EMBEDDING, OUTPUT):
            for number, pieces in self._pieces.items():
                tensor[number] = tensor[list(pieces)].double().mean(0).to(tensor.dtype)
        return tensor


def _logits(opened: Checkpoint, options: ExtendOptions) -> tuple[list[Tensor], list[Tensor]] | None:
    """Batches of text without the new tokens, and what the model computes for them; None where that is not wanted."""
    if not options.logits:
        return None
    require_memory(opened.model, opened.directory)
    batches = comparison_batches(opened.directory, None, options.tokenizer, batches=1)
    return batches, checkpoint_logits(opened.directory, batches, trust_remote_code=options.trust_remote_code)


def _examined(partial: Path, expected: TensorSource, added: Added) -> list[str]:
    """Compare every tensor and the tokenizer of the result, read again, with what they should be.

    Raises:
        ConversionError: something did not come through.
    """
    result = open_checkpoint(partial)
    for name in expected.specs:
        ours, theirs = expected.read(name), result.tensors.read(name)
        if ours.dtype != theirs.dtype or not _same(ours, theirs):
            raise ConversionError(f"{partial}: {name}, read again, is not what was written")
    vocabulary = {} if result.tokenizer is None else Tokenizer(result.tokenizer).vocabulary
    if lost := [token for token, number in added.ids.items() if vocabulary.get(token) != number]:
        raise ConversionError(f"{partial}: its tokenizer, read again, lacks {lost[0]!r}")
    return [f"weights: all {len(expected.specs):,} tensors are the source's, but for the new rows"]


def _compared(
    partial: Path, known: int, added: Added, batches: list[Tensor], before: list[Tensor], options: ExtendOptions
) -> list[str]:
    """Compare the logits of tokens that were there before, on text of such.

    Raises:
        ConversionError: the model computes something else for them.
    """
    after = checkpoint_logits(partial, batches, trust_remote_code=options.trust_remote_code)
    # A model may have had rows, for no token, that the new ones take.
    kept = [number for number in range(known) if number not in added.pieces]
    compared = compare_logits([one[..., kept] for one in before], [one[..., kept] for one in after])
    lines = logit_lines(compared)
    if not compared.relative <= _TOLERANCE:
        said = "\n  ".join(lines)
        raise ConversionError(f"{options.target}: not written, it computes otherwise than before:\n  {said}")
    return lines


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal; NaN, of a model that diverged, is the same as NaN."""
    return torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num()))
