"""Merges tokenizers of several languages on disk, and measures what became of each language."""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ext.data.prepare.corpus import corpus_files
from megatron_ext.data.prepare.documents import read_documents
from megatron_ext.data.tokenizer.export import CONTENTS, write_tokenizer
from megatron_ext.data.tokenizer.fertility import Fertility, kinds_of, measure
from megatron_ext.data.tokenizer.merge import Merged, Part, check_compatible, merge_models, without_spaces
from megatron_ext.data.tokenizer.model_file import BYTE, USER_DEFINED, Model, read_model_file
from megatron_ext.data.tokenizer.names import with_names
from megatron_ext.data.tokenizer.pieces import encode_lines, read_model, sentencepiece_of
from megatron_ext.data.tokenizer.reading import Tokenizer
from megatron_ext.data.tokenizer.sample import MAX_CHARACTERS, MAX_LINES, Sample, lines_of, sample
from megatron_ext.data.tokenizer.training import Training, train_sentencepiece
from megatron_ext.errors import DataError
from megatron_ext.files import output_place
from megatron_ext.locks import exclusive_output
from megatron_ext.progress import counted

_HELD_OUT = 20
"""Each so many documents, one is not counted, but measured on."""
_MEASURED = 5_000_000
"""Characters of a language that are measured, at most."""
_PROOF_TEXTS = 500


@dataclass(frozen=True)
class Language:
    """One language of a merged tokenizer."""

    model: Path
    """SentencePiece model, or the folder of a tokenizer that has one."""
    quota: int
    """Normal pieces that it brings."""
    texts: Sequence[str | Path]
    """Its part of the mix."""
    strip_spaces: bool = False
    """Its training text was segmented by spaces: they go from its pieces."""


@dataclass(frozen=True)
class MergedTokenizer:
    """What was merged, and how it does."""

    tokenizer: Tokenizer
    merged: Merged
    fertility: dict[str, dict[str, Fertility]]
    """`own model`, `merged` and, if it was asked for, `joint model`, of each language, on documents that no count was
    made of where there are enough."""


def merge_tokenizers(
    languages: Mapping[str, Language],
    output: str | Path,
    *,
    scores: Literal["mixture", "em"] = "mixture",
    names: Sequence[str] = (),
    text_key: str = "text",
    max_lines: int = MAX_LINES,
    max_characters: int = MAX_CHARACTERS,
    joint: bool = False,
    force: bool = False,
) -> MergedTokenizer:
    """Merge the unigram models of `languages` into the tokenizer `output`.

    Args:
        names: proper nouns that are whole pieces.
        max_lines: of each language, from which probabilities are counted.
        max_characters: likewise.
        joint: train one model of the same size on the same text, too, to be measured beside the merged one.

    Raises:
        DataError: they cannot be merged; nothing is written.
    """
    models = {name: _read(one) for name, one in languages.items()}
    files = {name: corpus_files(one.texts) for name, one in languages.items()}
    read = [*itertools.chain.from_iterable(files.values()), *(one.model for one in languages.values())]
    output_place(output, DataError, force=force, contents=CONTENTS, inputs=read)
    check_compatible([Part(name, model, 0, Sample([], 0, 0, 0)) for name, model in models.items()])
    with exclusive_output(output, "merging tokenizers"):
        parts = []
        for name, one in languages.items():
            lines = sample(lines_of(_documents(files[name], text_key, held_out=False)), max_lines, max_characters)
            if not any(line.strip() for line in lines.texts):
                raise DataError(f"{files[name][0]}: no text of {name}, by which its pieces would be weighed; give some")
            parts.append(Part(name, models[name], one.quota, lines))
        merged = merge_models(parts, scores)
        if names:
            lines_of_all = [line for part in parts for line in part.text.texts]
            merged = Merged(with_names(merged.model, names, lines_of_all), merged.brought, merged.shares)
        held_out = {name: _held_out(files[name], text_key) for name in languages}
        proof = [text for texts in held_out.values() for text in texts[: _PROOF_TEXTS // len(held_out)]]
        tokenizer = write_tokenizer(merged.model.to_bytes(), output, [*proof, *names], force=force)
        other = {"joint model": dict.fromkeys(models, _joint(parts, merged.model))} if joint else {}
    models_of = {"own model": models, "merged": dict.fromkeys(models, merged.model), **other}
    fertility = {
        what: {name: _measured(model, held_out[name]) for name, model in of_each.items()}
        for what, of_each in models_of.items()
    }
    return MergedTokenizer(tokenizer, merged, fertility)


def _joint(parts: Sequence[Part], like: Model) -> Model:
    """One model of all the text, with as many pieces as `like` and its symbols."""
    symbols = [piece.text for piece in like.of(USER_DEFINED) if piece.text != "\n"]
    how = Training(user_symbols=symbols, byte_fallback=bool(like.of(BYTE)), threads=os.cpu_count() or 1)
    lines = itertools.chain.from_iterable(part.text.texts for part in parts)
    return read_model_file(train_sentencepiece(lines, len(like.pieces), how), "the joint model")


def _read(language: Language) -> Model:
    model = read_model_file(read_model(language.model), str(language.model))
    return without_spaces(model) if language.strip_spaces else model


def _documents(files: Sequence[Path], text_key: str, *, held_out: bool) -> Iterator[str]:
    """The documents that are counted, or those that are held out."""
    for number, document in enumerate(counted(read_documents(files, text_key), "documents read")):
        if (number % _HELD_OUT == _HELD_OUT - 1) == held_out:
            yield document


def _held_out(files: Sequence[Path], text_key: str) -> list[str]:
    """Documents to measure on; of fewer than 20, those that were counted."""
    held_out = sample(_documents(files, text_key, held_out=True), max_characters=_MEASURED).texts
    return held_out or sample(read_documents(files, text_key), max_characters=_MEASURED).texts


def _measured(model: Model, texts: Sequence[str]) -> Fertility:
    pieces = sentencepiece_of(model.to_bytes(), "the model")
    vocabulary = {piece.text: number for number, piece in enumerate(model.pieces)}
    return measure(lambda text: encode_lines(pieces, text), kinds_of(vocabulary), texts)
