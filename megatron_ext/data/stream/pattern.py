"""Which source each sample of a stage is from: Megatron's greedy blend, periodic, so that any sample is found at once.

megatron-core keeps 10 bytes for every sample of the run. Here one period of 2**20 samples is kept (1 or 2 bytes each),
with counts at every 4096th; the n-th sample and the samples of each source before it follow by arithmetic.
"""

import importlib.machinery
import importlib.util
from collections.abc import Sequence
from fractions import Fraction
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

PERIOD = 1 << 20
"""Samples after which a mix repeats; the same as Megatron's blend up to here."""
_MARK = 4096
"""Samples between two of the counts that are kept."""
_SHORT = 1 << 14
"""Samples of a period that are computed first."""


class Pattern(Protocol):
    """Sources of the samples 0, 1, 2, ... of a stage, by their number in it."""

    def source(self, n: int) -> int:
        """The source of sample `n`."""

    def counts(self, n: int) -> list[int]:
        """How many of the first `n` samples each source has."""

    def count(self, source: int, n: int) -> int:
        """How many of the first `n` samples are from `source`."""


class One:
    """Every sample is from the only source."""

    def source(self, n: int) -> int:
        """See `Pattern`."""
        return 0

    def counts(self, n: int) -> list[int]:
        """See `Pattern`."""
        return [n]

    def count(self, source: int, n: int) -> int:
        """See `Pattern`."""
        return n


class _Stretch:
    """A run of picks of which the prefix counts are known at every 4096th."""

    def __init__(self, picks: np.ndarray[Any, Any], num_sources: int) -> None:
        self.picks = picks
        marks = len(picks) // _MARK
        self._marks = np.zeros((marks + 1, num_sources), dtype=np.int64)
        for mark in range(marks):
            block = picks[mark * _MARK : (mark + 1) * _MARK]
            self._marks[mark + 1] = self._marks[mark] + np.bincount(block, minlength=num_sources)

    def counts(self, n: int) -> np.ndarray[Any, Any]:
        """How many of the first `n` picks each source has."""
        mark = n // _MARK
        rest = self.picks[mark * _MARK : n]
        counted: np.ndarray[Any, Any] = self._marks[mark] + np.bincount(rest, minlength=self._marks.shape[1])
        return counted

    def count(self, source: int, n: int) -> int:
        """How many of the first `n` picks are `source`."""
        mark = n // _MARK
        return int(self._marks[mark, source]) + int(np.count_nonzero(self.picks[mark * _MARK : n] == source))


class Mix:
    """The greedy blend by weight, which repeats after 2**20 samples."""

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = tuple(weights)

    @cached_property
    def _total(self) -> np.ndarray[Any, Any]:
        return _period(self._weights, PERIOD).counts(PERIOD)

    def _known(self, n: int) -> _Stretch:
        """The period as far as sample `n` of it, at least: a short run needs no long one."""
        return _period(self._weights, _SHORT if n < _SHORT else PERIOD)

    def source(self, n: int) -> int:
        """See `Pattern`."""
        within = n % PERIOD
        return int(self._known(within).picks[within])

    def counts(self, n: int) -> list[int]:
        """See `Pattern`."""
        periods, within = divmod(n, PERIOD)
        counts = self._known(within).counts(within)
        found: list[int] = (counts + periods * self._total if periods else counts).tolist()
        return found

    def count(self, source: int, n: int) -> int:
        """See `Pattern`."""
        periods, within = divmod(n, PERIOD)
        counted = self._known(within).count(source, within)
        return counted + periods * int(self._total[source]) if periods else counted


class Take:
    """Exact counts, each source spread over the whole; after the last sample the pattern begins anew.

    Up to 2**20 samples it is Megatron's exhaustive rule; more are cut into blocks of 2**20, in each of which every
    source has its share to less than 2 samples, and the rule is kept within.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self._each = np.array(counts, dtype=np.int64)
        self._size = int(self._each.sum())
        self._ends = _block_ends(list(counts))
        self._made: tuple[int, _Stretch] | None = None

    def source(self, n: int) -> int:
        """See `Pattern`."""
        block, within = divmod(n % self._size, PERIOD)
        return int(self._block(block).picks[within])

    def counts(self, n: int) -> list[int]:
        """See `Pattern`."""
        rounds, rest = divmod(n, self._size)
        block, within = divmod(rest, PERIOD)
        found = rounds * self._each + self._ends[block]
        if within:
            found = found + self._block(block).counts(within)
        counted: list[int] = found.tolist()
        return counted

    def count(self, source: int, n: int) -> int:
        """See `Pattern`."""
        rounds, rest = divmod(n, self._size)
        block, within = divmod(rest, PERIOD)
        found = rounds * int(self._each[source]) + int(self._ends[block][source])
        return found + self._block(block).count(source, within) if within else found

    def _block(self, number: int) -> _Stretch:
        if self._made is None or self._made[0] != number:
            counts = self._ends[number + 1] - self._ends[number]
            self._made = number, _Stretch(_exhaustive(counts), len(counts))
        return self._made[1]


def mix_pattern(weights: Sequence[float]) -> Pattern:
    """The pattern of a mix."""
    return One() if len(weights) == 1 else Mix(weights)


def take_pattern(counts: Sequence[int]) -> Pattern:
    """The pattern of exact counts."""
    return One() if len(counts) == 1 else Take(counts)


def greedy(weights: Sequence[float], size: int) -> np.ndarray[Any, Any]:
    """The sources of `size` samples by megatron-core's rule: argmax of w * max(n, 1) - c, the first of equal ones.

    Source: megatron-core, helpers.cpp, build_blending_indices.
    """
    shares = np.array(shares_of(weights), dtype=np.float64)
    picks, within = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    _helpers().build_blending_indices(picks, within, shares, len(shares), size, False)
    return _small(picks, len(shares))


@lru_cache(maxsize=64)
def _period(weights: tuple[float, ...], size: int) -> _Stretch:
    return _Stretch(greedy(weights, size), len(weights))


def shares_of(weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1: of the decimals as they are written, so that 7:2:1 and .7:.2:.1 are the same shares."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    total = sum(exact)
    return [float(weight / total) for weight in exact]


def _exhaustive(counts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The sources of as many samples as `counts` says, by megatron-core's rule over those not yet spent."""
    present = np.flatnonzero(counts)
    size = int(counts.sum())
    picks, within = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    _helpers().build_exhaustive_blending_indices(picks, within, counts[present].copy(), len(present))
    return _small(present.astype(np.int16)[picks], len(counts))


def _small(picks: np.ndarray[Any, Any], num_sources: int) -> np.ndarray[Any, Any]:
    return picks.astype(np.uint8) if num_sources <= 256 else picks


def _block_ends(counts: list[int]) -> list[np.ndarray[Any, Any]]:
    """Samples of each source before each block of 2**20, and in all; in integers, so that nothing is lost."""
    total, done = sum(counts), [0] * len(counts)
    ends = [np.array(done, dtype=np.int64)]
    for start in range(0, total, PERIOD):
        stop = min(start + PERIOD, total)
        # What is owed, times the total: whole parts first, what is left to the largest remainders.
        owed = [max(count * stop - have * total, 0) for count, have in zip(counts, done, strict=True)]
        given = [part // total for part in owed]
        left = stop - start - sum(given)
        order = sorted(range(len(counts)), key=lambda i: owed[i] % total, reverse=left >= 0)
        step = 1 if left >= 0 else -1
        while left:
            for i in order:
                if left and 0 <= given[i] + step <= counts[i] - done[i]:
                    given[i] += step
                    left -= step
        done = [have + new for have, new in zip(done, given, strict=True)]
        ends.append(np.array(done, dtype=np.int64))
    return ends


@cache
def _helpers() -> Any:
    """megatron-core's compiled helpers, without the package around them, which would import torch."""
    package = importlib.util.find_spec("megatron")
    for place in (package.submodule_search_locations or ()) if package else ():
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            path = Path(place, "core", "datasets", f"helpers_cpp{suffix}")
            if path.is_file():
                loader = importlib.machinery.ExtensionFileLoader("helpers_cpp", str(path))
                spec = importlib.util.spec_from_loader("helpers_cpp", loader)
                assert spec is not None
                module = importlib.util.module_from_spec(spec)
                loader.exec_module(module)
                return module
    raise ImportError("megatron-core has no compiled helpers (megatron/core/datasets/helpers_cpp); install it anew")
