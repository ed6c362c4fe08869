"""SentencePiece models: loading, and encoding as they mean it."""

import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from megatron_ext.checkpoint.tokenizer_files import MODEL_FILE
from megatron_ext.errors import DataError
from megatron_ext.foreign import LFS_POINTER

TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
"""Of a tiktoken list: a token in base64 and its rank."""
BATCH = 10_000
"""Lines that are encoded at once."""


def is_text(text: str) -> bool:
    """Whether UTF-8 has all its characters: what a command line had of other bytes is in halves of characters."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def read_model(path: str | Path) -> bytes:
    """The SentencePiece model in the file at `path`, or in the folder of a tokenizer there, unread.

    Raises:
        DataError: there is none.
    """
    file = Path(path) / MODEL_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise DataError(f"{file}: no such file; expected a SentencePiece model, or the folder of a tokenizer with one")
    return file.read_bytes()


def load_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece model in the file at `path`; raises DataError where there is none."""
    return sentencepiece_of(path.read_bytes(), str(path))


def sentencepiece_of(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece model of those bytes; raises DataError where they are none, calling them `name`."""
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name}: not a SentencePiece model{_instead(model)}") from error
    if pieces.get_piece_size() == 0:
        raise DataError(f"{name}: not a SentencePiece model{_instead(model)}")
    return pieces


def _instead(model: bytes) -> str:
    """What bytes are that are no SentencePiece model, as far as they show it."""
    if model.startswith(LFS_POINTER):
        return ", but a Git LFS pointer to one; fetch it by 'git lfs pull', or download it again"
    if TIKTOKEN_LINE.match(model):
        return ", but a tiktoken list; use the tokenizer.json of the same model"
    return ", or cut or damaged; download it again" if model else ", but empty"


def encode_lines(pieces: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """Encode `text`, line by line where the newline is a token that always stands alone.

    Over a long text SentencePiece's sums in single precision lose the difference between two segmentations.
    """
    newline = pieces.piece_to_id("\n")
    alone = pieces.encode("a\nb") == [*pieces.encode("a"), newline, *pieces.encode("b")]
    if not alone or pieces.is_unknown(newline):
        return list(pieces.encode(text))
    ids: list[int] = []
    for line in pieces.encode(text.split("\n")):
        ids.extend(line)
        ids.append(newline)
    return ids[:-1]


def count_tokens(pieces: sentencepiece.SentencePieceProcessor, lines: Sequence[str]) -> int:
    """Tokens of all `lines`."""
    return sum(len(ids) for start in range(0, len(lines), BATCH) for ids in pieces.encode(lines[start : start + BATCH]))
