"""Trains a SentencePiece model that reproduces any text exactly."""

import io
import itertools
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from megatron_ext.data.prepare.corpus import corpus_files
from megatron_ext.data.prepare.documents import read_documents
from megatron_ext.data.prepare.faults import SKIPPING, Faults, say_left_out
from megatron_ext.data.prepare.workers import interruptible
from megatron_ext.data.tokenizer.export import CONTENTS, write_tokenizer
from megatron_ext.data.tokenizer.model_file import read_model_file
from megatron_ext.data.tokenizer.names import with_names
from megatron_ext.data.tokenizer.pieces import is_text
from megatron_ext.data.tokenizer.reading import Tokenizer
from megatron_ext.data.tokenizer.sample import MAX_CHARACTERS, MAX_LINES, lines_of, sample
from megatron_ext.errors import DataError
from megatron_ext.files import output_place
from megatron_ext.locks import exclusive_output
from megatron_ext.progress import counted

_UNK, _BOS, _EOS, _PAD = range(4)
_PROOF_TEXTS = 500
_LONGEST_PIECE = 16
"""Characters: SentencePiece's own default."""
CHARACTER_COVERAGE = 0.9995
"""Share of the characters of the text that get a token of their own; rarer ones are written in bytes."""
_OPTIONS = {"character_coverage with --character_coverage option": "--character-coverage", "vocab_size": "--vocab-size"}
"""What SentencePiece's messages name, and what it is called here."""

_SETTINGS: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    # The letters of "</s>" and "<0x0A>": spelt out in a text they must have a reading as plain characters.
    "required_chars": "<>/0123456789ABCDEFxsunkpad",
    "unk_id": _UNK,
    "bos_id": _BOS,
    "eos_id": _EOS,
    "pad_id": _PAD,
    "minloglevel": 2,
}


@dataclass(frozen=True)
class Training:
    """How a model is trained. As it is, any text comes back from its ids: it is not normalised, spaces are kept."""

    model_type: Literal["unigram", "bpe"] = "unigram"
    byte_fallback: bool = True
    """Characters without a piece are written in bytes; otherwise all of them are one unknown token."""
    split_digits: bool = True
    """Every digit is a token."""
    user_symbols: Sequence[str] = ()
    """Pieces that are cut out of the text before anything else. The newline is one always."""
    pretokenization_delimiter: str = ""
    """Marks, in the text to train on, where no piece may go across; the model itself knows nothing of it."""
    names: Sequence[str] = ()
    """Proper nouns that are whole pieces (`names.py`)."""
    character_coverage: float = CHARACTER_COVERAGE
    """Share of the text's characters that get a token each; the others are written in bytes."""
    max_lines: int = MAX_LINES
    """Lines to train on; of more an even sample is taken."""
    max_characters: int = MAX_CHARACTERS
    """Characters to train on, likewise."""
    threads: int = 1


def train_sentencepiece(documents: Iterable[str], vocab_size: int, how: Training = Training()) -> bytes:  # noqa: B008
    """Train a model on `documents`, and return its bytes.

    Raises:
        DataError: the text cannot fill such a vocabulary, or the symbols or names cannot be in it.
    """
    _check_symbols(how)
    delimiter = how.pretokenization_delimiter
    lines = sample(lines_of(documents, delimiter), how.max_lines, how.max_characters).texts
    model = _trained([*lines, *_seeds(lines, how)], vocab_size, how)
    if not how.names:
        return model
    lines = [line.replace(delimiter, "") for line in lines] if delimiter else lines
    return with_names(read_model_file(model, "the model"), how.names, lines).to_bytes()


def _seeds(lines: Sequence[str], how: Training) -> list[str]:
    """The words between delimiters that come more than once, to be lines of their own.

    SentencePiece's first pieces are strings that go on in different ways (a suffix array): without this, a word that a
    delimiter follows each time would be none.
    """
    if not how.pretokenization_delimiter or how.model_type != "unigram":
        return []
    counts = Counter(itertools.chain.from_iterable(line.split(how.pretokenization_delimiter) for line in lines))
    return [word for word, count in counts.items() if count > 1 and 1 < len(word) <= _LONGEST_PIECE]


def _trained(lines: Sequence[str], vocab_size: int, how: Training) -> bytes:
    model = io.BytesIO()

    def train(interrupted: threading.Event) -> None:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.takewhile(lambda _: not interrupted.is_set(), lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=how.model_type,
            byte_fallback=how.byte_fallback,
            split_digits=how.split_digits,
            user_defined_symbols=["\n", *how.user_symbols],
            pretokenization_delimiter=how.pretokenization_delimiter,
            character_coverage=how.character_coverage,
            **_SETTINGS,
            num_threads=how.threads,
        )

    try:
        interruptible(train)
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1]
        for theirs, ours in _OPTIONS.items():
            reason = reason.replace(theirs, ours)
        raise DataError(f"SentencePiece could not train {vocab_size} pieces on {len(lines)} lines: {reason}") from error
    return model.getvalue()


def _check_symbols(how: Training) -> None:
    """Raise DataError for symbols that no piece can be, before the text is read."""
    if how.names and how.model_type != "unigram":
        raise DataError(f"names need a unigram model: pieces of {how.model_type} have no probability")
    if how.pretokenization_delimiter and not how.pretokenization_delimiter.strip():
        raise DataError("the delimiter is white space, which text has of its own; mark boundaries by |||| or the like")
    seen = {"\n", "<unk>", "<s>", "</s>", "<pad>"}
    for symbol in how.user_symbols:
        if not symbol or not is_text(symbol) or any(character.isspace() or character == "▁" for character in symbol):
            raise DataError(
                f"the symbol {symbol!r} is empty, not UTF-8 or has spaces, that a fast tokenizer would not find in text"
            )
        if symbol in seen:
            raise DataError(f"the symbol {symbol!r} is a piece already; leave it out")
        seen.add(symbol)


def train_tokenizer(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int,
    how: Training = Training(),  # noqa: B008
    *,
    text_key: str = "text",
    bad_lines: Literal["stop", "skip"] = "stop",
    force: bool = False,
) -> Tokenizer:
    """Train a tokenizer on the documents of `inputs` and write it to `output`.

    Args:
        bad_lines: whether a line that cannot be read ends the command, or is counted and left out.
    """
    files, is_fatal = corpus_files(inputs), bad_lines == "stop"
    faults = Faults(is_fatal, SKIPPING)
    output_place(output, DataError, force=force, contents=CONTENTS, inputs=files)
    with exclusive_output(output, "training a tokenizer"):
        read, first = counted(read_documents(files, text_key, faults), "documents read"), list[str]()
        while not (first and first[-1].strip()):
            if (document := next(read, None)) is None:
                more = f" and {len(files) - 1} more" if len(files) > 1 else ""
                bad = f", or one of {faults.count:,} bad lines" if faults.count else ""
                raise DataError(
                    f"{files[0]}{more}: no text to train on, all documents are empty{bad}; give other files"
                )
            first.append(document)
        model = train_sentencepiece(itertools.chain(first, read), vocab_size, how)
        say_left_out({"bad line": faults.count}, faults.messages)
        documents = itertools.islice(read_documents(files, text_key, Faults(is_fatal)), _PROOF_TEXTS)
        delimiter = how.pretokenization_delimiter
        texts = (text.replace(delimiter, "") for text in documents) if delimiter else documents
        return write_tokenizer(model, output, [*texts, *how.names], force=force)
