"""The best paths through unigram pieces, compiled by numba: the steps of `segment_reading` and `running_scores`.

They take a tenth of the time in which Python does them. The arithmetic is the same to the last bit: double precision,
one addition after the other. Only imported where numba is, which is an extra.

Legend of array shapes: C characters, S segments, U unclear segments, T tokens, N nodes of the tree of all beginnings of
pieces.
"""

import contextlib
import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.core.caching import FunctionCache

from megatron_ext.data.prepare.running_scores import SPACES, UNKNOWN_PENALTY, Line

_FREE = np.uint64(0xFFFFFFFFFFFFFFFF)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_CODE_BITS, _WORD = np.uint64(21), np.uint64(64)
_PLANE = 1 << 16
"""Code points whose nodes are found without the table."""
_NO_PATH = -1e300
_LEAD = 1.0
"""What a path leads by where there is no other."""


class _Tree(NamedTuple):
    """All beginnings of pieces, as an automaton.

    Attributes:
        first: node of each character of the basic plane, -1 where no piece begins so, int32 [65536].
        keys: open addressing by node and next character, uint64; `nodes` at the same place is what follows, int32.
        shift: of a product, to the place where the search in `keys` begins.
        ids: of the piece that a node is, or -1, int32 [N].
        scores: of that piece, float64 [N].
        goes_on: whether a longer piece begins so, bool [N].
        unknown: score of a character that is no piece.
    """

    first: np.ndarray
    keys: np.ndarray
    nodes: np.ndarray
    shift: np.uint64
    ids: np.ndarray
    scores: np.ndarray
    goes_on: np.ndarray
    unknown: float


class CompiledPaths:
    """Segmentations by the scores of a vocabulary.

    Args:
        vocabulary: pieces and scores, exactly as the library has them, in the order of their ids.
        near: differences of scores that rounding could turn.
    """

    def __init__(self, vocabulary: Sequence[tuple[str, float]], near: float) -> None:
        self._tree, self._near = _tree_of(vocabulary), near

    def best(self, segments: Sequence[str]) -> list[tuple[list[int] | None, bool]]:
        """Ids of the best segmentation of each, None where another is as good; whether all characters are known."""
        if not segments:
            return []
        codes_C = np.frombuffer("".join(segments).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        stops_S = np.cumsum(np.array([len(segment) for segment in segments], dtype=np.int64))
        counts_S, known_S, ids_T = _best(_marked(codes_C), stops_S, self._near, self._tree)
        lists = _lists(np.maximum(counts_S, 0), ids_T)
        found = zip(lists, counts_S.tolist(), known_S.tolist(), strict=True)
        return [(ids if count >= 0 else None, known) for ids, count, known in found]

    def read_behind(self, line: Line, scores: np.ndarray, byte_ids: np.ndarray) -> list[list[int]]:
        """Ids of the unclear segments, each read behind all that its sum begins with.

        Args:
            scores: what each token adds to a sum, float64 [vocabulary].
            byte_ids: of the byte pieces, int64 [256].
        """
        marked = line._replace(codes=_marked(line.codes))
        return _lists(*_read_behind(marked, scores, byte_ids, self._tree))


def _marked(codes_C: np.ndarray) -> np.ndarray:
    space, mark = map(ord, SPACES)
    return np.where(codes_C == space, np.uint32(mark), codes_C)


def _lists(counts: np.ndarray, ids_T: np.ndarray) -> list[list[int]]:
    ids, ends = ids_T.tolist(), np.cumsum(counts).tolist()
    return [ids[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _tree_of(vocabulary: Sequence[tuple[str, float]]) -> _Tree:
    nodes = {"": 0}
    for piece, _ in vocabulary:
        for end in range(1, len(piece) + 1):
            nodes.setdefault(piece[:end], len(nodes))
    ids, scores = np.full(len(nodes), -1, dtype=np.int32), np.zeros(len(nodes))
    for number, (piece, score) in enumerate(vocabulary):
        ids[nodes[piece]], scores[nodes[piece]] = number, score
    keys, goes_on = np.zeros(len(nodes), dtype=np.uint64), np.zeros(len(nodes), dtype=np.bool_)
    first = np.full(_PLANE, -1, dtype=np.int32)
    for text, node in nodes.items():
        if node:
            parent, code = nodes[text[:-1]], ord(text[-1])
            keys[node], goes_on[parent] = parent << int(_CODE_BITS) | code, True
            if parent == 0 and code < _PLANE:
                first[code] = node
    unknown = min(score for _, score in vocabulary) - UNKNOWN_PENALTY
    return _Tree(first, *_table_of(keys), ids, scores, goes_on, unknown)


def _table_of(keys_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.uint64]:
    """An open addressing of all keys but the first, with two to four times as many places, and its shift."""
    bits = max(4, (2 * len(keys_N)).bit_length())
    table, numbers, shift = np.full(1 << bits, _FREE), np.zeros(1 << bits, dtype=np.int32), np.uint64(64 - bits)
    _fill(keys_N, table, numbers, shift)
    return table, numbers, shift


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
def _fill(keys_N: Any, table: Any, numbers: Any, shift: Any) -> None:
    for node in range(1, len(keys_N)):
        slot = np.int64((keys_N[node] * _SPREAD) >> shift)
        while table[slot] != _FREE:
            slot = (slot + 1) & (len(table) - 1)
        table[slot], numbers[slot] = keys_N[node], node


@_compiled
def _next(node: Any, code: Any, tree: Any) -> Any:
    """The node behind `node` by the character `code`, or -1."""
    key = (np.uint64(node) << _CODE_BITS) | np.uint64(code)
    slot = np.int64((key * _SPREAD) >> tree.shift)
    while tree.keys[slot] != key:
        if tree.keys[slot] == _FREE:
            return np.int32(-1)
        slot = (slot + 1) & (len(tree.keys) - 1)
    return tree.nodes[slot]


@_compiled
def _go_on(text: Any, start: Any, best: Any, lead: Any, length: Any, tree: Any) -> None:
    """Take all pieces that begin at `start`: best sums behind them, by how much these lead, and length of the piece."""
    code, stop = text[start], start + 1
    node = tree.first[code] if code < _PLANE else _next(0, code, tree)
    total = best[start] + (tree.scores[node] if node >= 0 and tree.ids[node] >= 0 else tree.unknown)
    while True:
        if total > best[stop]:
            lead[stop] = total - best[stop]
            best[stop], length[stop] = total, stop - start
        elif best[stop] - total < lead[stop]:
            lead[stop] = best[stop] - total
        while True:
            if node < 0 or not tree.goes_on[node] or stop == len(text):
                return
            node = _next(node, text[stop], tree)
            stop += 1
            if node >= 0 and tree.ids[node] >= 0:
                break
        total = best[start] + tree.scores[node]


@_compiled
def _id_of(piece: Any, tree: Any) -> Any:
    """The id of a piece, or -1 for a character that is none."""
    node = tree.first[piece[0]] if piece[0] < _PLANE else _next(0, piece[0], tree)
    for at in range(1, len(piece)):
        node = _next(node, piece[at], tree)
    return tree.ids[node] if node >= 0 else np.int32(-1)


@_compiled
def _scratch(stops: Any) -> Any:
    longest = begin = 0
    for stop in stops:
        longest, begin = max(longest, stop - begin), stop
    return np.empty(longest + 1), np.empty(longest + 1), np.zeros(longest + 1, np.int64)


@_compiled
def _best(codes: Any, stops: Any, near: Any, tree: Any) -> Any:
    """Of each segment: tokens, -1 where two paths are as good; whether all characters are known; and all ids."""
    counts, known, ids = np.zeros(len(stops), np.int64), np.ones(len(stops), np.bool_), np.empty(len(codes), np.int64)
    best, lead, length = _scratch(stops)
    used = begin = 0
    for number in range(len(stops)):
        text = codes[begin : stops[number]]
        size, begin = len(text), stops[number]
        best[1 : size + 1], lead[: size + 1] = _NO_PATH, _LEAD
        best[0] = 0.0
        for start in range(size):
            _go_on(text, start, best, lead, length, tree)
        at, count = size, 0
        while at > 0 and lead[at] >= near:
            at -= length[at]
            count += 1
        if at > 0:
            counts[number] = -1
            continue
        counts[number], at = count, size
        for place in range(used + count - 1, used - 1, -1):
            ids[place] = _id_of(text[at - length[at] : at], tree)
            known[number] &= ids[place] >= 0
            at -= length[at]
        used += count
    return counts, known, ids[:used]


@_compiled
def _read_behind(line: Any, added: Any, byte_ids: Any, tree: Any) -> Any:
    """Tokens of each unclear segment, and all their ids; `added`: what each token adds to a sum."""
    counts, characters = np.zeros(len(line.unclear), np.int64), 0
    for segment in line.unclear:
        characters += line.bounds[segment + 1] - line.bounds[segment]
    ids, used = np.empty(4 * characters, np.int64), 0
    first, at, total = -1, 0, 0.0
    for number, segment in enumerate(line.unclear):
        if line.firsts[number] != first:
            first = at = line.firsts[number]
            total = 0.0 if first > 0 else line.total
        for known in range(at, segment):
            for place in range(line.offsets[known], line.offsets[known] + line.counts[known]):
                total += added[line.tokens[place]]
        text = line.codes[line.bounds[segment] : line.bounds[segment + 1]]
        size = len(text)
        best, lead, length = np.full(size + 1, _NO_PATH), np.full(size + 1, _LEAD), np.zeros(size + 1, np.int64)
        best[0] = total
        for start in range(size):
            _go_on(text, start, best, lead, length, tree)
        total, at, begin = best[size], segment + 1, used
        used = _write_back(text, length, ids, used, byte_ids, tree)
        counts[number] = used - begin
    return counts, ids[:used]


@_compiled
def _write_back(text: Any, length: Any, ids: Any, used: Any, byte_ids: Any, tree: Any) -> Any:
    """Write the ids of a path behind the first `used`, bytes for characters that are no piece; how many there are."""
    begin, at = used, len(text)
    while at > 0:
        piece = text[at - length[at] : at]
        number, code = _id_of(piece, tree), np.int64(piece[0])
        if number >= 0:
            ids[used] = number
            used += 1
        elif code < 0x80:
            ids[used] = byte_ids[code]
            used += 1
        else:
            more = 1 if code < 0x800 else 2 if code < 0x10000 else 3
            for _ in range(more):
                ids[used] = byte_ids[0x80 | (code & 0x3F)]
                used += 1
                code >>= 6
            ids[used] = byte_ids[(0xF0 << (3 - more)) & 0xFF | code]
            used += 1
        at -= length[at]
    ids[begin:used] = ids[begin:used][::-1].copy()
    return used
