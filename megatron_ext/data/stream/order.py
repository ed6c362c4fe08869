"""The order inside a source: a pure function of (seed, source, epoch, index), computed without any table.

A source's tokens are cut into units of fixed length; what stands at an index of an epoch is found by a Feistel network
that permutes the units (cycle walking keeps it among them). Where samples are shorter than units, the samples of a
window of units are permuted among each other, so that those of one unit do not follow each other.
"""

from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np

WINDOW = 256
"""Units whose shorter samples are mixed with each other, at most."""
_WINDOWS = 128
"""Windows of a source, at least: where the sequence length changes, the rest of one is passed over."""
_ROUNDS = 6
_MASK = (1 << 64) - 1
_GOLDEN, _MULTIPLY_1, _MULTIPLY_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def window_of(units: int) -> int:
    """Units of a window of a source that has so many: what a change of length passes over is a small part of it."""
    return max(1, min(WINDOW, units // _WINDOWS))


def order_key(name: str) -> int:
    """The key of a permutation of that name, such as `seed:source:epoch`: 64 bits."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def permuted(name: str, n: int, index: int) -> int:
    """Where the permutation `name` of n items sends `index`."""
    half, mask, keys = _network(name, n)
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        index = (left << half) | right
        if index < n:
            return index


def permuted_all(name: str, n: int, indices: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`permuted` for an array of indices at once."""
    half, mask, keys = _network(name, n)
    found = np.array(indices, dtype=np.uint64)
    todo = np.arange(len(found))
    while len(todo):
        at = found[todo]
        left, right = at >> np.uint64(half), at & np.uint64(mask)
        for key in keys:
            left, right = right, left ^ (_mixed_all(right ^ np.uint64(key)) & np.uint64(mask))
        found[todo] = at = (left << np.uint64(half)) | right
        todo = todo[at >= n]
    return found.astype(np.int64)


def sample_at(source: str, epoch: int, units: int, k: int, position: int, window: int) -> tuple[int, int]:
    """The unit, and the part of it, that is read at a position of an epoch of a shuffled source.

    Args:
        source: `seed:id`.
        units: of an epoch.
        k: samples in a unit.
        position: from 0 to before units * k.
        window: units of a window.
    """
    name = f"{source}:{epoch}"
    if k == 1:
        return permuted(name, units, position), 0
    number, within = divmod(position, window * k)
    here = min(window, units - number * window)
    slot, part = divmod(permuted(f"{name}:{number}:{k}", here * k, within), k)
    return permuted(name, units, number * window + slot), part


@lru_cache(maxsize=1024)
def _network(name: str, n: int) -> tuple[int, int, tuple[int, ...]]:
    """Bits of a half, their mask, and the key of each round."""
    bits = max(2, (n - 1).bit_length())
    half = (bits + 1) // 2
    key = order_key(name)
    return half, (1 << half) - 1, tuple(_mixed((key + r * _GOLDEN) & _MASK) for r in range(_ROUNDS))


def _mixed(x: int) -> int:
    """The finaliser of splitmix64."""
    x = ((x ^ (x >> 30)) * _MULTIPLY_1) & _MASK
    x = ((x ^ (x >> 27)) * _MULTIPLY_2) & _MASK
    return x ^ (x >> 31)


def _mixed_all(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MULTIPLY_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MULTIPLY_2)
    mixed: np.ndarray[Any, Any] = x ^ (x >> np.uint64(31))
    return mixed
