"""Trains a SentencePiece model that reproduces any text exactly."""

import io
import itertools
import random
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_ext.data.prepare.corpus import corpus_files
from megatron_ext.data.prepare.documents import read_documents
from megatron_ext.data.prepare.workers import interruptible
from megatron_ext.data.tokenizer.export import CONTENTS, write_tokenizer
from megatron_ext.data.tokenizer.reading import Tokenizer
from megatron_ext.errors import DataError
from megatron_ext.files import output_place
from megatron_ext.locks import exclusive_output

_UNK, _BOS, _EOS, _PAD = range(4)
_LONGEST_LINE = 4000
_PROOF_TEXTS = 500
CHARACTER_COVERAGE = 0.9995
"""Share of the characters of the text that get a token of their own; rarer ones are written in bytes."""
_OPTIONS = {"character_coverage with --character_coverage option": "--character-coverage", "vocab_size": "--vocab-size"}
"""What SentencePiece's messages name, and what it is called here."""

_SETTINGS: dict[str, Any] = {
    "model_type": "unigram",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "user_defined_symbols": ["\n"],
    # The letters of "</s>" and "<0x0A>": spelt out in a text they must have a reading as plain characters.
    "required_chars": "<>/0123456789ABCDEFxsunkpad",
    "unk_id": _UNK,
    "bos_id": _BOS,
    "eos_id": _EOS,
    "pad_id": _PAD,
    "minloglevel": 2,
}


def train_sentencepiece(
    documents: Iterable[str],
    vocab_size: int,
    *,
    max_lines: int = 1_000_000,
    character_coverage: float = CHARACTER_COVERAGE,
    seed: int = 0,
    threads: int = 1,
) -> bytes:
    """Train a unigram model with byte fallback that reproduces any text exactly, and return its bytes.

    Text is not normalised, spaces and indentation are kept, digits are single tokens and a newline is a token.

    Args:
        max_lines: lines to train on; more are sampled down evenly.
        character_coverage: share of the text's characters that get a token each; the others are written in bytes.

    Raises:
        DataError: the text cannot fill such a vocabulary.
    """
    model = io.BytesIO()
    lines = _sample_lines(documents, max_lines, seed)

    def train(interrupted: threading.Event) -> None:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.takewhile(lambda _: not interrupted.is_set(), lines),
            model_writer=model,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            **_SETTINGS,
            num_threads=threads,
        )

    try:
        interruptible(train)
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1]
        for theirs, ours in _OPTIONS.items():
            reason = reason.replace(theirs, ours)
        raise DataError(f"SentencePiece could not train {vocab_size} pieces on {len(lines)} lines: {reason}") from error
    return model.getvalue()


def _sample_lines(documents: Iterable[str], limit: int, seed: int) -> list[str]:
    """At most `limit` of the non-empty lines, each equally likely (reservoir sampling), in a fixed order."""
    generator, seen = random.Random(seed), 0
    kept: list[str] = []
    for document in documents:
        for line in _short_lines(document):
            seen += 1
            if len(kept) < limit:
                kept.append(line)
            elif (slot := generator.randrange(seen)) < limit:
                kept[slot] = line
    return kept


def _short_lines(document: str) -> Iterator[str]:
    for line in document.split("\n"):
        for start in range(0, len(line), _LONGEST_LINE):
            yield line[start : start + _LONGEST_LINE]


def train_tokenizer(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int,
    *,
    text_key: str = "text",
    max_lines: int = 1_000_000,
    character_coverage: float = CHARACTER_COVERAGE,
    threads: int = 1,
    force: bool = False,
) -> Tokenizer:
    """Train a tokenizer on the documents of `inputs` and write it to `output`."""
    files = corpus_files(inputs)
    output_place(output, DataError, force=force, contents=CONTENTS, inputs=files)
    with exclusive_output(output, "training a tokenizer"):
        model = train_sentencepiece(
            read_documents(files, text_key),
            vocab_size,
            max_lines=max_lines,
            character_coverage=character_coverage,
            threads=threads,
        )
        texts = itertools.islice(read_documents(files, text_key), _PROOF_TEXTS)
        return write_tokenizer(model, output, texts, force=force)
