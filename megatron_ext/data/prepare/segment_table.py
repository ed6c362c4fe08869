"""A table of segments of text and their token ids, looked up for all segments of a batch at once.

Legend of array shapes: C characters, S segments, T tokens.
"""

import numpy as np

_SLOT_BITS = 20
_MOST_SEGMENTS = 1 << 19
_FIRST_CHARACTERS = 1 << 18
_SPREAD = np.uint64(0xD6E8FEB86659FD93)
_CHECK_SHIFT, _COUNT_SHIFT = np.uint64(40), np.uint64(32)
MOST_TOKENS = 255
"""Tokens of the longest segment that is kept."""


class SegmentHash:
    """A polynomial over the characters of segments, modulo 2^64: of all of a batch from one running sum."""

    def __init__(self, multiplier: int) -> None:
        self._multiplier, self._inverse = multiplier, pow(multiplier, -1, 1 << 64)
        self._set_powers(_FIRST_CHARACTERS)

    def _set_powers(self, count: int) -> None:
        self._powers = _powers(self._multiplier, count)
        self._inverse_powers = _powers(self._inverse, count)

    def __call__(self, codes_C: np.ndarray, starts_S: np.ndarray) -> np.ndarray:
        """uint64 [S] of the segments that begin at `starts_S`."""
        sums = self._sums(codes_C)
        before_S = sums[starts_S]
        result: np.ndarray = (np.append(before_S[1:], sums[-1]) - before_S) * self._inverse_powers[starts_S]
        return result

    def of_windows(self, codes_C: np.ndarray, size: int) -> np.ndarray:
        """uint64 [C - size + 1] of all runs of `size` characters."""
        sums = self._sums(codes_C)
        result: np.ndarray = (sums[size:] - sums[:-size]) * self._inverse_powers[: len(sums) - size]
        return result

    def _sums(self, codes_C: np.ndarray) -> np.ndarray:
        if len(codes_C) > len(self._powers):
            self._set_powers(2 * len(codes_C))
        sums = np.empty(len(codes_C) + 1, dtype=np.uint64)
        sums[0] = 0
        np.cumsum((codes_C + np.uint32(1)) * self._powers[: len(codes_C)], out=sums[1:])
        return sums


def _powers(base: int, count: int) -> np.ndarray:
    """base^0, base^1, ... modulo 2^64."""
    result = np.ones(count, dtype=np.uint64)
    done = 1
    while done < count:
        more = min(done, count - done)
        result[done : done + more] = result[:more] * np.uint64(pow(base, done, 1 << 64))
        done += more
    return result


class SegmentTable:
    """Tokens of segments by their hashes: open addressing, an entry being 24 bits of check, 8 of count, 32 of place.

    Attributes:
        tokens: of all segments, end to end.
    """

    def __init__(self, dtype: np.dtype[np.generic]) -> None:
        self._dtype = dtype
        self._clear()

    def _clear(self) -> None:
        self._keys = np.zeros(1 << _SLOT_BITS, dtype=np.uint64)
        self._entries = np.zeros(1 << _SLOT_BITS, dtype=np.uint64)
        self.tokens, self._used, self._size = np.empty(1 << 20, dtype=self._dtype), 0, 0

    def find(self, keys_S: np.ndarray, checks_S: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of each segment, int64 [S]; where they begin, int64 [S]; which segments are not here."""
        if self._size > _MOST_SEGMENTS:
            self._clear()
        slots_S = _home(keys_S)
        entries_S = self._entries[slots_S]
        unlike_S = (self._keys[slots_S] != keys_S) | ((entries_S ^ checks_S) >> _CHECK_SHIFT != 0)
        missing, left = [], np.flatnonzero(unlike_S)
        while len(left):
            is_free = self._keys[slots_S[left]] == 0
            missing.append(left[is_free])
            left = left[~is_free]
            slots = slots_S[left] = (slots_S[left] + 1) & ((1 << _SLOT_BITS) - 1)
            entries_S[left] = self._entries[slots]
            unlike = (self._keys[slots] != keys_S[left]) | ((entries_S[left] ^ checks_S[left]) >> _CHECK_SHIFT != 0)
            left = left[unlike]
        counts_S = ((entries_S >> _COUNT_SHIFT) & np.uint64(255)).astype(np.int64)
        offsets_S = (entries_S & np.uint64(0xFFFFFFFF)).astype(np.int64)
        return counts_S, offsets_S, np.concatenate(missing) if missing else left

    def add(self, keys: np.ndarray, checks: np.ndarray, ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Take in segments of up to MOST_TOKENS; their counts of tokens and where these begin."""
        counts, offsets = self.lend(ids)
        self._used += int(counts.sum())
        self._size += len(ids)
        high = checks >> _CHECK_SHIFT << _CHECK_SHIFT
        self._insert(keys, high | (counts.astype(np.uint64) << _COUNT_SHIFT) | offsets.astype(np.uint64))
        return counts, offsets

    def lend(self, ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Hold tokens until the next call; their counts and where they begin."""
        counts = np.array([len(one) for one in ids])
        flat = [token for one in ids for token in one]
        while self._used + len(flat) > len(self.tokens):
            self.tokens = np.concatenate([self.tokens, np.empty_like(self.tokens)])
        self.tokens[self._used : self._used + len(flat)] = flat
        return counts, self._used + np.cumsum(counts) - counts

    def _insert(self, keys: np.ndarray, entries: np.ndarray) -> None:
        slots = _home(keys)
        while len(keys):
            _, first = np.unique(slots, return_index=True)
            first = first[self._keys[slots[first]] == 0]
            self._keys[slots[first]], self._entries[slots[first]] = keys[first], entries[first]
            left = np.ones(len(keys), dtype=bool)
            left[first] = False
            keys, entries = keys[left], entries[left]
            slots = (slots[left] + 1) & ((1 << _SLOT_BITS) - 1)


def gather(tokens: np.ndarray, counts_S: np.ndarray, offsets_S: np.ndarray) -> np.ndarray:
    """The `tokens` of segments, end to end [T]."""
    places_T = np.repeat(offsets_S - (np.cumsum(counts_S) - counts_S), counts_S)
    places_T += np.arange(len(places_T))
    tokens_T: np.ndarray = tokens[places_T]
    return tokens_T


def _home(keys: np.ndarray) -> np.ndarray:
    """The slot where the search for each key begins."""
    slots: np.ndarray = ((keys * _SPREAD) >> np.uint64(64 - _SLOT_BITS)).astype(np.int64)
    return slots
