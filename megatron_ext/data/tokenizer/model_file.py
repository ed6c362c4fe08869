"""The pieces of a SentencePiece model as its file has them: text, score and type, to be read, changed and written."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from megatron_ext.data.tokenizer.pieces import sentencepiece_of

_TYPES = sentencepiece_model_pb2.ModelProto.SentencePiece.Type
NORMAL, UNKNOWN, CONTROL = _TYPES.Value("NORMAL"), _TYPES.Value("UNKNOWN"), _TYPES.Value("CONTROL")
USER_DEFINED, BYTE, UNUSED = _TYPES.Value("USER_DEFINED"), _TYPES.Value("BYTE"), _TYPES.Value("UNUSED")
UNIGRAM: int = sentencepiece_model_pb2.TrainerSpec.UNIGRAM
BPE: int = sentencepiece_model_pb2.TrainerSpec.BPE
SPACE = "▁"
"""How pieces spell a space."""


@dataclass(frozen=True)
class Piece:
    """One piece; the place in a list of them is its id."""

    text: str
    score: float
    """Log-probability of a normal piece of a unigram model."""
    type: int


@dataclass(frozen=True)
class Model:
    """A SentencePiece model."""

    proto: Any
    pieces: tuple[Piece, ...]

    @property
    def is_unigram(self) -> bool:
        """Whether its scores are log-probabilities."""
        return bool(self.proto.trainer_spec.model_type == UNIGRAM)

    def of(self, *types: int) -> list[Piece]:
        """The pieces of some types."""
        return [piece for piece in self.pieces if piece.type in types]

    def with_pieces(self, pieces: Iterable[Piece]) -> "Model":
        """The same model of other pieces."""
        made = sentencepiece_model_pb2.ModelProto()
        made.CopyFrom(self.proto)
        made.DiscardUnknownFields()  # such as samples for a self-test, of the old pieces
        del made.pieces[:]
        kept = tuple(pieces)
        for piece in kept:
            made.pieces.add(piece=piece.text, score=piece.score, type=piece.type)
        made.trainer_spec.vocab_size = len(kept)
        return Model(made, kept)

    def to_bytes(self) -> bytes:
        """The content of its file; the same bytes for the same model."""
        return bytes(self.proto.SerializeToString(deterministic=True))


def read_model_file(content: bytes, name: str) -> Model:
    """The model in those bytes.

    Raises:
        DataError: they are none; it calls them `name`.
    """
    sentencepiece_of(content, name)
    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    return Model(proto, tuple(Piece(one.piece, one.score, one.type) for one in proto.pieces))


def by_score(pieces: Iterable[Piece]) -> list[Piece]:
    """The likeliest first; equal ones by their text, so that the order is the same everywhere."""
    return sorted(pieces, key=lambda piece: (-piece.score, piece.text))
