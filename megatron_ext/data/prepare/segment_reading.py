"""Where a text may be cut so that its parts have the ids of the whole, and the ids of such parts.

No piece of the vocabulary holds the two characters on both sides of a cut, so no path of unigram pieces and no merge
crosses it. What is left is rounding: of unigram segmentations whose scores are (nearly) the same, such as those of
"ハハハハハ", the library takes one by the last bit of a sum over all that stands before. Such parts are found here; by
their `running_scores` they are read behind that sum, or else their lines and documents are read whole.
"""

import json
from collections.abc import Sequence
from typing import Any

from megatron_ext.data.prepare.running_scores import SPACES, RunningScores, edges_of, running_scores
from megatron_ext.data.tokenizer import Tokenizer

_NEAR = 1e-6
"""Differences of scores that rounding could turn: sums of documents of 1e7 tokens are good to 1e-7."""
_NO_PIECE = -1e12
_NOTHING = (-1, _NO_PIECE, False)


class SegmentReader:
    """Reads segments of text by the rules of one tokenizer.

    Attributes:
        pieces: all that can be a token: text may be cut between two characters that stand side by side in none.
        reads_lines: whether the library reads each line by itself, the newline being a token that is cut out before.
        reads_apart: whether a segment is read as itself, whatever stands around it.
        scores: what reads segments by all that stands before them in their line, where that can be known.
    """

    def __init__(
        self, tokenizer: Tokenizer, model: dict[str, Any], added: Sequence[dict[str, Any]], *, adds_up: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._added = [token["content"] for token in added if token["id"] not in tokenizer.special_ids]
        self.pieces = [*tokenizer.vocabulary, *(token["content"] for token in added)]
        self.reads_lines = [token for token in self._added if "\n" in token] == ["\n"]
        self._unigram = _Unigram(model["vocab"]) if model["type"] == "Unigram" else None
        self.reads_apart = self._unigram is None
        self.scores: RunningScores | None = None
        # Sums begin anew behind a token that is cut out of the text, which special ones are not.
        cut_out = [token["content"] for token in added if not token["special"]]
        if self._unigram is not None and adds_up and cut_out in ([], ["\n"]):
            special = tokenizer.special_ids | {token["id"] for token in added if token["special"]}
            self.scores = running_scores(model["vocab"], tokenizer.vocabulary, special)

    def read(self, segments: Sequence[str]) -> list[list[int] | None]:
        """Ids of each segment; None where they may depend on the text around it."""
        if self._unigram is None:
            return list(self._tokenizer.encode_batch(segments))
        result: list[list[int] | None] = []
        foreign = []
        for number, segment in enumerate(segments):
            if any(token in segment and token != segment for token in self._added):
                result.append(None)
                continue
            ids, is_known = self._unigram.best(segment)
            if ids is not None and not (is_known and self._tokenizer.special_ids.isdisjoint(ids)):
                foreign.append(number)
            result.append(ids)
        read = self._tokenizer.encode_batch([segments[number] for number in foreign]) if foreign else []
        for number, ids in zip(foreign, read, strict=True):
            result[number] = ids
        return result


class _Unigram:
    """The best segmentation of short texts, where there is one that is clearly the best."""

    def __init__(self, vocabulary: Sequence[tuple[str, float]]) -> None:
        self._edges, self._unknown = edges_of(vocabulary)

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
    has_bytes = model.get("byte_fallback") and all(f"<0x{byte:02X}>" in tokenizer.vocabulary for byte in range(256))
    looks_around = any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)
    in_place = _keeps_places(content["normalizer"], content["pre_tokenizer"])
    if not has_bytes or looks_around or not in_place or "" in tokenizer.vocabulary:
        return None
    if model["type"] != "Unigram" and not _merges_apart(model, tokenizer):
        return None
    pre_tokenizer = content["pre_tokenizer"]
    return SegmentReader(tokenizer, model, added, adds_up=pre_tokenizer is None or pre_tokenizer.get("split") is False)


def _keeps_places(normalizer: Any, pre_tokenizer: Any) -> bool:
    """Whether each character is read as itself, or a space as its mark, wherever it stands."""
    space, mark = SPACES
    if normalizer is not None and normalizer != {"type": "Replace", "pattern": {"String": space}, "content": mark}:
        return False
    if pre_tokenizer is None:
        return True
    is_metaspace = pre_tokenizer["type"] == "Metaspace" and pre_tokenizer["replacement"] == mark
    return bool(is_metaspace and pre_tokenizer["prepend_scheme"] == "never")


def _merges_apart(model: dict[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether merges within a text follow from that text, and go on from no special token."""
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] != "BPE" or model.get("dropout") or model.get("ignore_merges") or affixes:
        return False
    special = {piece for piece, number in tokenizer.vocabulary.items() if number in tokenizer.special_ids}
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    return special.isdisjoint(part for pair in pairs for part in pair)
