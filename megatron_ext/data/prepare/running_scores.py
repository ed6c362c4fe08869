"""Reads what unigram scores leave open as the tokenizers library does: by their sum from the beginning of a line.

Of two segmentations that score the same to rounding, the library takes the one whose sum in double precision is larger,
and all that stands before is part of the sum. That sum is had here from the ids before, added in the library's order,
and from there on a segment is read by the library's own steps: no line need be held or read whole.

Source: tokenizers, models/unigram/model.rs, `encode_optimized`.

Legend of array shapes: C characters, S segments, U unclear segments.
"""

from array import array
from collections.abc import Mapping, Sequence, Set
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megatron_ext.data.prepare.segment_table import gather

SPACES = (" ", "▁")
"""The space, and what stands for it in a vocabulary."""
UNKNOWN_PENALTY = 10.0
"""By how much an unknown character scores less than the worst piece, in the tokenizers library as in SentencePiece."""
_NO_PIECE = -1e12
"""Score of what is no piece, so that no text is read so."""
_NOTHING = (-1, _NO_PIECE, False)
_MARGIN = 1.0
_FEW = 16
_SHORT, _MOST_KEPT = 100, 1 << 14
"""Characters of segments at the beginning of a line that are kept, and how many."""

Edge = tuple[int, float, bool]
"""A piece, or the beginning of one: its id, or -1, its score, and whether a longer piece begins so."""


def unknown_of(vocabulary: Sequence[tuple[str, float]]) -> Edge:
    """What a character is that begins no piece."""
    return -1, min(score for _, score in vocabulary) - UNKNOWN_PENALTY, False


def edges_of(vocabulary: Sequence[tuple[str, float]]) -> dict[str, Edge]:
    """All beginnings of pieces."""
    longer = {piece[:end] for piece, _ in vocabulary for end in range(1, len(piece))}
    _, unknown, _ = unknown_of(vocabulary)
    edges = {piece: (-1, _NO_PIECE, True) for piece in longer if len(piece) > 1}
    edges |= {piece: (-1, unknown, True) for piece in longer if len(piece) == 1}
    edges |= {piece: (number, score, piece in longer) for number, (piece, score) in enumerate(vocabulary)}
    return edges


class Line(NamedTuple):
    """Segments of a text, some of which are not clear.

    Attributes:
        codes: code points of the text, uint32 [C].
        bounds: where each segment begins, and the end of the text, int64 [S + 1].
        counts: tokens of each segment, 0 where they are looked for, int64 [S].
        offsets: where these tokens begin in `tokens`, int64 [S].
        tokens: of the segments that are known.
        unclear: numbers of the segments that are looked for, in order, int64 [U].
        firsts: number of the segment that the sum before each of these begins with, int64 [U].
        total: the sum before segment 0.
    """

    codes: np.ndarray
    bounds: np.ndarray
    counts: np.ndarray
    offsets: np.ndarray
    tokens: np.ndarray
    unclear: np.ndarray
    firsts: np.ndarray
    total: float


class RunningScores:
    """The scores of a vocabulary, and what they make of text that stands behind other text.

    Args:
        vocabulary: pieces and scores, exactly as the library has them, in the order of their ids.
        byte_ids: of the byte pieces, by byte.

    Attributes:
        vocabulary: the same.
        byte_ids: the same, int64 [256].
        added: what each token adds to a sum, float64 [vocabulary].
    """

    def __init__(self, vocabulary: Sequence[tuple[str, float]], byte_ids: Sequence[int]) -> None:
        self.vocabulary, self._byte_ids, self._unknown = vocabulary, byte_ids, unknown_of(vocabulary)
        self.byte_ids = np.array(byte_ids, dtype=np.int64)
        self._begun: dict[str, tuple[list[int], float]] = {}
        # Of a character that is written in bytes the first one stands for all.
        self.added = np.array([score for _, score in vocabulary], dtype=np.float64)
        for byte, number in enumerate(byte_ids):
            self.added[number] = 0.0 if 0x80 <= byte < 0xC0 else self._unknown[1]

    @cached_property
    def _edges(self) -> dict[str, Edge]:
        return edges_of(self.vocabulary)

    def after(self, total: float, ids: np.ndarray) -> float:
        """The sum behind `ids`, which stand behind `total`."""
        if len(ids) < _FEW:
            for score in self.added[ids].tolist():
                total += score
            return total
        scores = self.added[ids]
        scores[0] = total + scores[0]
        return float(np.add.accumulate(scores)[-1])  # one after the other, as the library adds

    def read(self, segment: str, total: float) -> tuple[list[int], float]:
        """Ids of a segment that stands behind `total`, and the sum behind it."""
        if total or len(segment) > _SHORT:
            return self._read(segment, total)
        if (known := self._begun.get(segment)) is None:  # indentation, above all
            if len(self._begun) >= _MOST_KEPT:
                self._begun.clear()
            known = self._begun[segment] = self._read(segment, 0.0)
        return known

    def read_behind(self, line: Line, text: str) -> list[list[int]]:
        """Ids of the unclear segments of `text`, each read behind all that its sum begins with."""
        first, at, total, result = -1, 0, 0.0, []
        bounds = line.bounds.tolist()
        for segment, begin in zip(line.unclear.tolist(), line.firsts.tolist(), strict=True):
            if begin != first:
                first = at = begin
                total = 0.0 if begin else line.total
            if at < segment:
                total = self.after(total, gather(line.tokens, line.counts[at:segment], line.offsets[at:segment]))
            ids, total = self.read(text[bounds[segment] : bounds[segment + 1]], total)
            result.append(ids)
            at = segment + 1
        return result

    def _read(self, segment: str, total: float) -> tuple[list[int], float]:
        text = segment.replace(*SPACES)
        size, edges, unknown = len(text), self._edges, self._unknown
        best, length = array("d", [_NO_PIECE]) * (size + 1), array("H", [0]) * (size + 1)
        best[0] = total
        for start in range(size):
            so_far, stop = best[start], start + 1
            _, score, goes_on = edges.get(text[start], unknown)
            while True:
                if so_far + score > best[stop]:
                    best[stop], length[stop] = so_far + score, stop - start
                if not goes_on or stop == size:
                    break
                stop += 1
                _, score, goes_on = edges.get(text[start:stop], _NOTHING)
        return self._ids(text, length), best[size]

    def _ids(self, text: str, length: "array[int]") -> list[int]:
        """Ids of the pieces that end where `length` says how long they are, from the last one on."""
        ids: list[int] = []
        at = len(text)
        while at > 0:
            piece = text[at - length[at] : at]
            number = self._edges.get(piece, self._unknown)[0]
            ids += [number] if number >= 0 else [self._byte_ids[byte] for byte in reversed(piece.encode())]
            at -= len(piece)
        return ids[::-1]


def running_scores(
    vocabulary: Sequence[tuple[str, float]], ids: Mapping[str, int], never_read: frozenset[int]
) -> RunningScores | None:
    """Scores of a vocabulary with byte fallback; None where an id alone does not say what was added for it.

    Args:
        ids: by piece.
        never_read: ids of special tokens.
    """
    scores = dict(vocabulary)
    byte_ids = byte_ids_of(ids)
    spelt = never_read.union(byte_ids)
    if may_be_read(vocabulary, {piece for piece in scores if ids[piece] in spelt}):
        return None
    if max(map(len, scores)) >= 1 << 16 or min(scores.values()) > 0:
        return None
    return RunningScores(vocabulary, byte_ids)


def may_be_read(vocabulary: Sequence[tuple[str, float]], pieces: Set[str]) -> set[str]:
    """Those of `pieces` that need not lose against their own characters where a text spells them."""
    scores = dict(vocabulary)
    own = {piece: sum(scores.get(character, -np.inf) for character in piece) for piece in pieces}
    return {piece for piece, total in own.items() if total < scores[piece] + _MARGIN}


def byte_ids_of(ids: Mapping[str, int]) -> list[int]:
    """Ids of the byte pieces, by byte."""
    return [ids[f"<0x{byte:02X}>"] for byte in range(256)]
