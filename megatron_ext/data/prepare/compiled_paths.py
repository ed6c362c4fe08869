"""The best paths through unigram pieces, compiled by numba: the tokenizers library's own steps, for whole lines.

The arithmetic is the same to the last bit: sums in double precision from the beginning of a line, one addition after
the other, and of two paths with one sum the first. Only imported where numba is, which is an extra.

Source: tokenizers, models/unigram/model.rs, `encode_optimized`.

Legend of array shapes: C characters, B breaks, T tokens, N places of a table.
"""

import contextlib
import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.core.caching import FunctionCache

from megatron_ext.data.prepare.running_scores import SPACES, UNKNOWN_PENALTY

_FREE = np.uint64(0xFFFFFFFFFFFFFFFF)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_CODE_BITS = np.uint64(21)
_PLANE = 1 << 16
"""Code points whose nodes are found without a search."""
_NO_PATH = -np.inf


class _Tree(NamedTuple):
    """All beginnings of pieces, as an automaton. A node is its place in a table, found by open addressing.

    Attributes:
        first: node of each character of the basic plane, -1 where no piece begins so, int32 [65536].
        keys: the node before, and one more, with the character behind it, uint64 [N].
        scores: of the piece that a node is, minus infinity where it is none, float64 [N].
        ids: of that piece, int32 [N].
        lengths: characters of a node, int32 [N].
        goes_on: whether a longer piece begins so, bool [N].
        shift: of a product of a key, to the place where the search for it begins.
        unknown: score of a character that is no piece.
    """

    first: np.ndarray
    keys: np.ndarray
    scores: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    goes_on: np.ndarray
    shift: np.uint64
    unknown: float


class Breaks(NamedTuple):
    """What stands between the lines of a text, in order: where each begins and stops, and its id; int64 [B]."""

    starts: np.ndarray
    stops: np.ndarray
    ids: np.ndarray


class CompiledPaths:
    """Segmentations by the scores of a vocabulary.

    Args:
        vocabulary: pieces and scores, exactly as the library has them, in the order of their ids.
        byte_ids: of the byte pieces, int64 [256].
        hidden: ids of pieces that no text is read as, int64.
    """

    def __init__(self, vocabulary: Sequence[tuple[str, float]], byte_ids: np.ndarray, hidden: np.ndarray) -> None:
        self._tree, self._byte_ids = _tree_of(vocabulary, hidden), byte_ids
        # Sums in a ring: no more are held than the longest piece is long.
        self._best = np.full(1 << int(self._tree.lengths.max()).bit_length(), _NO_PATH)
        self._ids_T = np.empty(0, dtype=np.int32)

    def read(self, codes_C: np.ndarray, breaks: Breaks, limit: int, total: float) -> tuple[np.ndarray, int, float]:
        """Ids of a text, int32 [T], valid until the next call; how many characters they are of, and the sum behind.

        Args:
            codes_C: its code points, uint32.
            limit: where the text goes on behind it, the last place that the ids may end at. They end where every path
                passes, which may be at 0.
            total: the sum before it.
        """
        most = 4 * len(codes_C) + len(breaks.ids)
        if most > len(self._ids_T):
            self._ids_T = np.empty(most, dtype=np.int32)
        space, mark = map(ord, SPACES)
        marked_C = np.where(codes_C == space, np.uint32(mark), codes_C)
        used, stop, total = _read(marked_C, breaks, limit, total, self._best, self._byte_ids, self._tree, self._ids_T)
        return self._ids_T[:used], stop, total


def _tree_of(vocabulary: Sequence[tuple[str, float]], hidden: np.ndarray) -> _Tree:
    pieces, scores = [piece for piece, _ in vocabulary], np.array([score for _, score in vocabulary])
    codes = np.frombuffer("".join(pieces).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).copy()
    stops = np.cumsum([len(piece) for piece in pieces])
    unknown, size = scores.min() - UNKNOWN_PENALTY, len(codes)
    scores[hidden] = _NO_PATH
    while True:  # the characters of all pieces are more than their nodes
        bits = (2 * size).bit_length()
        places, shift = 1 << bits, np.uint64(64 - bits)
        first, keys, no_scores = np.full(_PLANE, -1, np.int32), np.full(places, _FREE), np.full(places, _NO_PATH)
        ids, lengths = np.zeros((2, places), np.int32)
        tree = _Tree(first, keys, no_scores, ids, lengths, np.zeros(places, np.bool_), shift, unknown)
        nodes = _fill(codes, stops, scores, tree)
        if 4 * nodes >= places:
            return tree
        size = nodes


class _KeptCode(FunctionCache):  # type: ignore[misc]
    """Compiled code of one function on the disk, which spares time and is never needed.

    numba's own ends the program with what a full disk or a file cut short raises, at every start. And it writes the
    list of a function's files before the files: killed in between, or on a disk that is full, it would take the code
    of an older source for that of this one.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever bytes that are no code of ours raise
            self._forget()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            if not self._cache_file._load_index():
                self._forget()
            super().save_overload(sig, data)
        except Exception:
            self._forget()

    def _forget(self) -> None:
        with contextlib.suppress(OSError):
            for path in Path(self.cache_path).glob(glob.escape(self._impl.filename_base) + ".*"):
                path.unlink(missing_ok=True)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled at its first call and kept on the disk, where there is a place for it."""
    result: Callable[..., Any] = numba.njit(nogil=True)(function)
    with contextlib.suppress(RuntimeError):  # no folder can be written to
        result._cache = _KeptCode(function)  # type: ignore[attr-defined]
    return result


@_compiled
def _find(node: Any, code: Any, tree: Any) -> Any:
    """The place of the node behind `node` (-1: the root) by the character `code`, or the free one where it would be."""
    key = (np.uint64(node + 1) << _CODE_BITS) | np.uint64(code)
    place = np.int64((key * _SPREAD) >> tree.shift)
    while tree.keys[place] != key and tree.keys[place] != _FREE:
        place = (place + 1) & (len(tree.keys) - 1)
    return place


@_compiled
def _fill(codes: Any, stops: Any, scores: Any, tree: Any) -> Any:
    """Put pieces that stand end to end into an empty tree; how many nodes that makes."""
    begin = nodes = 0
    for number in range(len(stops)):
        node = np.int64(-1)
        for at in range(begin, stops[number]):
            place = _find(node, codes[at], tree)
            if tree.keys[place] == _FREE:
                tree.keys[place] = (np.uint64(node + 1) << _CODE_BITS) | np.uint64(codes[at])
                tree.lengths[place] = at + 1 - begin
                nodes += 1
            if node >= 0:
                tree.goes_on[node] = True
            elif codes[at] < _PLANE:
                tree.first[codes[at]] = place
            node = place
        tree.scores[node], tree.ids[node], begin = scores[number], number, stops[number]
    return nodes


@_compiled
def _read(codes: Any, breaks: Any, limit: Any, total: Any, best: Any, byte_ids: Any, tree: Any, ids: Any) -> Any:
    """Write the ids to `ids`; how many, of how many characters, and the sum behind the last."""
    longest: Any = np.int64(0)
    at: Any = np.int64(0)
    for number in range(len(breaks.ids)):
        longest, at = max(longest, breaks.starts[number] - at), breaks.stops[number]
    path = np.empty(max(longest, len(codes) - at) + 1, np.int32)
    used, at = 0, np.int64(0)  # the type of places, for the compiler
    for number in range(len(breaks.ids)):
        best[0] = total
        _, total = _find_path(codes[at : breaks.starts[number]], len(codes), best, path, tree)
        used = _write_back(codes[at : breaks.starts[number]], path, ids, used, byte_ids, tree)
        ids[used] = breaks.ids[number]
        used, at, total = used + 1, breaks.stops[number], 0.0
    best[0] = total
    stop, total = _find_path(codes[at:], limit - at, best, path, tree)
    used = _write_back(codes[at : at + stop], path, ids, used, byte_ids, tree)
    return used, at + stop, total


@_compiled
def _find_path(text: Any, limit: Any, best: Any, path: Any, tree: Any) -> Any:
    """Write to `path` the node of the last piece of the best path to each place, -1 for a character that is none.

    Returns the last place, not behind `limit`, where all paths pass, and the sum there.

    Args:
        best: sums, a ring: at 0 that before the text, elsewhere none.
    """
    size, last = len(text), len(best) - 1
    reach: Any = np.int64(0)
    stop: Any = np.int64(0)
    total = best[0]
    for start in range(size):
        before = best[start & last]
        best[start & last] = _NO_PATH
        if start == reach and start <= limit:
            stop, total = start, before
        code, end = text[start], start + 1
        node = np.int64(tree.first[code]) if code < _PLANE else _find(-1, code, tree)
        score = tree.scores[node] if node >= 0 else _NO_PATH
        if score == _NO_PATH:
            score, piece = tree.unknown, np.int64(-1)
        else:
            piece = node
        while True:
            if before + score > best[end & last]:
                best[end & last], path[end] = before + score, piece
            if node < 0 or not tree.goes_on[node] or end == size:
                break
            node = _find(node, text[end], tree)
            if tree.keys[node] == _FREE:
                break
            end += 1
            score, piece = tree.scores[node], node
        reach = max(reach, end)
    before, best[size & last] = best[size & last], _NO_PATH
    return (size, before) if size <= limit else (stop, total)


@_compiled
def _write_back(text: Any, path: Any, ids: Any, used: Any, byte_ids: Any, tree: Any) -> Any:
    """Write the ids of a path behind the first `used`, bytes for characters that are no piece; how many there are."""
    begin, at = used, len(text)
    while at > 0:
        if path[at] >= 0:
            ids[used] = tree.ids[path[at]]
            used, at = used + 1, at - tree.lengths[path[at]]
            continue
        at -= 1
        code = np.int64(text[at])
        more = 0 if code < 0x80 else 1 if code < 0x800 else 2 if code < 0x10000 else 3
        for _ in range(more):
            ids[used] = byte_ids[0x80 | (code & 0x3F)]
            used, code = used + 1, code >> 6
        ids[used] = byte_ids[code if more == 0 else (0xF0 << (3 - more)) & 0xFF | code]
        used += 1
    for place in range((used - begin) // 2):
        ids[begin + place], ids[used - 1 - place] = ids[used - 1 - place], ids[begin + place]
    return used
