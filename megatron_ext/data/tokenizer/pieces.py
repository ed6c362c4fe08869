"""SentencePiece models: loading, and encoding as they mean it."""

from pathlib import Path

import sentencepiece

from megatron_ext.errors import DataError


def load_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece model in the file at `path`; raises DataError where there is none."""
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: not a SentencePiece model ({error})") from error


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
