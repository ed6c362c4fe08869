"""Where a text may be cut so that its parts have the ids of the whole, and the ids of such parts.

No piece of the vocabulary holds the two characters on both sides of a cut, so no path of unigram pieces and no merge
crosses it. What is left is rounding: of unigram segmentations whose scores are (nearly) the same, such as those of
"ハハハハハ", the library takes one by the last bit of a sum over all that stands before. Such parts are found here; by
their `running_scores` they are read behind that sum, or else their lines and documents are read whole.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from megatron_ext.data.prepare.running_scores import (
    SPACES,
    RunningScores,
    byte_ids_of,
    edges_of,
    may_be_read,
    running_scores,
    unknown_of,
)
from megatron_ext.data.tokenizer import Tokenizer

Notice = Callable[[Sequence[str]], None]
END = "\0"
"""Stands for the end of a document where many are encoded as one text."""
_NEAR = 1e-6
"""Differences of scores that rounding could turn: sums of documents of 1e7 tokens are good to 1e-7."""
MARKED_SPACES = {"type": "Replace", "pattern": {"String": SPACES[0]}, "content": SPACES[1]}
"""The normalizer that writes spaces as vocabularies have them."""
_NO_PIECE = -1e12
_NOTHING = (-1, _NO_PIECE, False)


class Paths(NamedTuple):
    """By what whole lines are read, where sums of scores say it all.

    A text that is read as a special token is read again without these. What is read then is also what it is read as
    where none of them is: a piece that is on no best path only lowers, once it is gone, the sums that lost to others.

    Attributes:
        vocabulary: pieces and scores, exactly as the library has them, in the order of their ids.
        byte_ids: of the byte pieces, int64 [256].
        hidden: ids of the pieces that no text is read as, int64.
        apart: pieces, with marks for spaces, that the library reads by what stands around them.
    """

    vocabulary: Sequence[tuple[str, float]]
    byte_ids: np.ndarray
    hidden: np.ndarray
    apart: frozenset[str]


class SegmentReader:
    """Reads segments of text by the rules of one tokenizer.

    Attributes:
        pieces: all that can be a token: text may be cut between two characters that stand side by side in none.
        cut_out: tokens that the library cuts out of a text before it reads what is between them, and their ids.
        reads_lines: whether the newline is one of these.
        reads_apart: whether a segment is read as itself, whatever stands around it.
        scores: what reads segments by all that stands before them in their line, where that can be known.
        paths: by what lines are read from their beginning, where they can be.
    """

    def __init__(
        self, tokenizer: Tokenizer, model: dict[str, Any], added: Sequence[dict[str, Any]], *, adds_up: bool
    ) -> None:
        self._tokenizer = tokenizer
        tokens = {token["content"]: token["id"] for token in added if token["id"] not in tokenizer.special_ids}
        plain = {token["content"] for token in added if not token["special"]}
        self.pieces = [*tokenizer.vocabulary, *(token["content"] for token in added)]
        with_line_end = [token["content"] for token in added if "\n" in token["content"]]
        self.reads_lines = with_line_end == ["\n"] and "\n" in tokens
        # Where a token has spaces, which may be written in two ways, only the library finds them all.
        have_spaces = any(space in token for token in plain for space in SPACES)
        are_found = model["type"] == "Unigram" and not have_spaces and not _hide_others(added, tokenizer.special_ids)
        found = plain if are_found else {"\n"} if self.reads_lines else set()
        self.cut_out = {token: number for token, number in tokens.items() if token in found}
        self._vocabulary = model["vocab"]
        self._hidden = [token.replace(*SPACES) for token in tokens if token not in self.cut_out]
        if model["type"] == "Unigram" and model["unk_id"] is not None:
            self._hidden.append(self._vocabulary[model["unk_id"]][0])  # read as one with unknown characters beside it
        by_length = sorted(self.cut_out, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, by_length))) if by_length else None
        longer = [token for token in by_length if len(token) > 1]
        self._longer = re.compile("|".join(map(re.escape, longer))) if longer else None
        self._single = [ord(token) for token in self.cut_out if len(token) == 1]
        self.reads_apart = model["type"] != "Unigram"
        self.scores: RunningScores | None = None
        self.paths: Paths | None = None
        # Sums begin anew behind a token that is cut out of the text, which special ones are not.
        if not self.reads_apart and adds_up and plain == self.cut_out.keys():
            special = tokenizer.special_ids | {token["id"] for token in added if token["special"]}
            self.scores = running_scores(model["vocab"], tokenizer.vocabulary, special | {model["unk_id"]})
            self.paths = _paths(model, tokenizer, special)

    def places(self, text: str, codes_C: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where tokens that are cut out begin and end in a text, and their ids; the first, and of these the longest."""
        matches = self._longer.finditer(text) if self._longer is not None else ()
        found = [(*match.span(), self.cut_out[match[0]]) for match in matches]
        starts, stops, ids = np.array(found, dtype=np.int64).reshape(-1, 3).T
        for code in self._single:
            more = np.flatnonzero(codes_C == code)
            if len(starts):
                before = np.searchsorted(starts, more, side="right")
                more = more[more >= np.concatenate(([0], stops))[before]]
            starts, stops = np.concatenate([starts, more]), np.concatenate([stops, more + 1])
            ids = np.concatenate([ids, np.full(len(more), self.cut_out[chr(code)])])
            order = np.argsort(starts, kind="stable")
            starts, stops, ids = starts[order], stops[order], ids[order]
        return starts, stops, ids

    def first_place(self, text: str, start: int, stop: int) -> int | None:
        """Where a token that is cut out begins behind `start`, or ends, if it begins there; None: not before `stop`."""
        found = self._any.search(text, start, stop) if self._any is not None else None
        if found is None:
            return None
        return found.start() if found.start() > start else found.end()

    def read(self, segments: Sequence[str]) -> list[list[int] | None]:
        """Ids of each segment; None where they may depend on the text around it."""
        if self.reads_apart:
            return list(self._tokenizer.encode_batch(segments))
        result: list[list[int] | None] = []
        foreign = []
        special, marked = self._tokenizer.special_ids, [segment.replace(*SPACES) for segment in segments]
        all_of_them = "".join(marked)
        hidden = [token for token in self._hidden if token in all_of_them]  # next to never one
        for number, (ids, is_known) in enumerate(map(self._unigram.best, segments)):
            if hidden and any(token in marked[number] for token in hidden):
                ids = None
            if ids is not None and not (is_known and special.isdisjoint(ids)):
                foreign.append(number)
            result.append(ids)
        read = self._tokenizer.encode_batch([segments[number] for number in foreign]) if foreign else []
        for number, ids in zip(foreign, read, strict=True):
            result[number] = ids
        return result

    @cached_property
    def _unigram(self) -> "_Unigram":
        return _Unigram(self._vocabulary)


class _Unigram:
    """The best segmentation of short texts, where there is one that is clearly the best."""

    def __init__(self, vocabulary: Sequence[tuple[str, float]]) -> None:
        self._edges, self._unknown = edges_of(vocabulary), unknown_of(vocabulary)

    def best(self, text: str) -> tuple[list[int] | None, bool]:
        """Ids of the best segmentation, None where another is as good; and whether all characters are known."""
        text = text.replace(*SPACES)
        size, edges, unknown = len(text), self._edges, self._unknown
        best, lead = [_NO_PIECE] * (size + 1), [1.0] * (size + 1)
        came_from, came_by = [0] * (size + 1), [-1] * (size + 1)
        best[0] = 0.0
        for start in range(size):
            so_far, stop = best[start], start + 1
            number, score, goes_on = edges.get(text[start], unknown)
            while True:
                total = so_far + score
                if total > best[stop]:
                    lead[stop] = total - best[stop]
                    best[stop], came_from[stop], came_by[stop] = total, start, number
                elif best[stop] - total < lead[stop]:
                    lead[stop] = best[stop] - total
                if not goes_on or stop == size:
                    break
                stop += 1
                number, score, goes_on = edges.get(text[start:stop], _NOTHING)
        ids, at = [], size
        while at > 0:
            if lead[at] < _NEAR:
                return None, True
            ids.append(came_by[at])
            at = came_from[at]
        return ids[::-1], -1 not in ids


def segment_reader(tokenizer: Tokenizer) -> SegmentReader | None:
    """What reads segments by the rules of `tokenizer`.

    None where text cannot be cut: normalizers and pre-tokenizers that look around them, spaces put in front of a text,
    unknown characters that are read together.
    """
    if tokenizer.fast is None:
        return None
    content = json.loads(tokenizer.fast.to_str())
    model, added = content["model"], content["added_tokens"]
    byte_ids = {tokenizer.vocabulary.get(f"<0x{byte:02X}>") for byte in range(256)}
    has_bytes = model.get("byte_fallback") and byte_ids.isdisjoint({None, *tokenizer.special_ids})
    looks_around = any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)
    in_place = _keeps_places(content["normalizer"], content["pre_tokenizer"])
    if not has_bytes or looks_around or not in_place or "" in tokenizer.vocabulary:
        return None
    if model["type"] != "Unigram" and not _merges_apart(model, tokenizer):
        return None
    pre_tokenizer = content["pre_tokenizer"]
    return SegmentReader(tokenizer, model, added, adds_up=pre_tokenizer is None or pre_tokenizer.get("split") is False)


def _paths(model: dict[str, Any], tokenizer: Tokenizer, special: frozenset[int]) -> Paths:
    """See `Paths`.

    Args:
        special: ids of special tokens, also of those that a text is read as.
    """
    vocabulary, ids = model["vocab"], tokenizer.vocabulary
    # Hidden from no text, and read as one with unknown characters beside it.
    unknown = set() if model["unk_id"] is None else {vocabulary[model["unk_id"]][0]}
    hidden = {piece for piece, number in ids.items() if number in tokenizer.special_ids} - unknown
    others = ({piece for piece, _ in vocabulary if ids[piece] in special} | unknown) - hidden
    return Paths(
        vocabulary,
        np.array(byte_ids_of(ids), dtype=np.int64),
        np.array([number for number, (piece, _) in enumerate(vocabulary) if piece in hidden], dtype=np.int64),
        frozenset(piece.replace(*SPACES) for piece in may_be_read(vocabulary, others)),
    )


def _hide_others(added: Sequence[dict[str, Any]], special_ids: frozenset[int]) -> bool:
    """Whether a plain token may stay unfound for what else is added, however far to the left it begins.

    The library looks for all tokens that are to be found before the text is normalized, and then, in what is left, for
    the others. Each time it passes a special token that is text over with all that begins in it.
    """
    groups: dict[tuple[bool, bool], set[str]] = {(n, s): set() for n in (False, True) for s in (False, True)}
    for token in added:
        groups[token["normalized"], token["special"] or token["id"] in special_ids].add(token["content"])
    sooner, later = groups[False, False], groups[True, False]
    pairs = (sooner, later), (sooner, groups[False, True]), (later, groups[True, True])
    return any(_overlap(*pair) or _overlap(*reversed(pair)) for pair in pairs)


def _overlap(some: set[str], others: set[str]) -> bool:
    """Whether one of `some` holds one of `others`, or ends with what one of these begins with."""
    begins = {token[:end] for token in others for end in range(1, len(token) + 1)}
    ends = {token[start:] for token in some for start in range(len(token))}
    return not begins.isdisjoint(ends) or any(other in token for token in some for other in others)


def _keeps_places(normalizer: Any, pre_tokenizer: Any) -> bool:
    """Whether each character is read as itself, or a space as its mark, wherever it stands."""
    if normalizer is not None and normalizer != MARKED_SPACES:
        return False
    if pre_tokenizer is None:
        return True
    is_metaspace = pre_tokenizer["type"] == "Metaspace" and pre_tokenizer["replacement"] == SPACES[1]
    return bool(is_metaspace and pre_tokenizer["prepend_scheme"] == "never")


def _merges_apart(model: dict[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether merges within a text follow from that text, and go on from no special token."""
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] != "BPE" or model.get("dropout") or model.get("ignore_merges") or affixes:
        return False
    special = {piece for piece, number in tokenizer.vocabulary.items() if number in tokenizer.special_ids}
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    return special.isdisjoint(part for pair in pairs for part in pair)


def codes_of(text: str) -> np.ndarray:
    """Code points, uint32 [C]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
