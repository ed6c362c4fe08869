"""The order inside a source, and the pattern of a stage: pure functions with known values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.data.stream.order import order_key, permuted, permuted_all, sample_at
from megatron_ext.data.stream.pattern import PERIOD, Mix, Pattern, Take, greedy, mix_pattern, shares_of, take_pattern

WIKI = "1234:wiki:0"


def test_known_keys_and_permutations() -> None:
    assert order_key(WIKI) == 4445592270594703663
    assert [permuted(WIKI, 10, i) for i in range(10)] == [5, 8, 3, 0, 4, 7, 2, 9, 1, 6]
    assert [permuted("1234:wiki:1", 10, i) for i in range(10)] == [3, 9, 1, 7, 4, 6, 2, 8, 5, 0]
    billion = [592822400, 22387942, 949879900, 574238825, 943001860, 564450618, 333153696, 175836634]
    assert [permuted(WIKI, 1_000_000_007, i) for i in range(8)] == billion
    everything = permuted_all(WIKI, 100_003, np.arange(100_003))
    assert everything[:6].tolist() == [13613, 69665, 20766, 2955, 93778, 44402]
    assert np.array_equal(np.sort(everything), np.arange(100_003))


@given(st.integers(1, 3000), st.text(max_size=5), st.data())
def test_every_permutation_is_one(n: int, name: str, data: st.DataObject) -> None:
    everything = permuted_all(name, n, np.arange(n))
    assert np.array_equal(np.sort(everything), np.arange(n))
    one = data.draw(st.integers(0, n - 1))
    assert permuted(name, n, one) == everything[one]


def test_known_samples_of_units_in_windows() -> None:
    pairs = [sample_at("1234:wiki", 0, 10, 2, p, window=4) for p in range(20)]
    assert pairs[:6] == [(8, 0), (3, 1), (0, 1), (5, 0), (8, 1), (5, 1)]
    assert pairs[6:12] == [(0, 0), (3, 0), (7, 1), (9, 1), (7, 0), (2, 1)]
    quarters = [sample_at("1234:wiki", 0, 10, 4, p, window=4) for p in range(40)]
    assert quarters[:6] == [(0, 0), (8, 3), (5, 3), (3, 3), (8, 0), (0, 3)]
    assert quarters[6:12] == [(8, 2), (5, 2), (3, 2), (0, 1), (3, 0), (5, 0)]
    assert sorted(pairs) == [(u, j) for u in range(10) for j in range(2)]
    assert sorted(quarters) == [(u, j) for u in range(10) for j in range(4)]
    assert [sample_at("1234:wiki", 0, 10, 1, p, window=4)[0] for p in range(10)] == [5, 8, 3, 0, 4, 7, 2, 9, 1, 6]


def digits(pattern: Pattern, n: int) -> str:
    return "".join(str(pattern.source(i)) for i in range(n))


def test_known_blends() -> None:
    pattern = Mix([0.5, 0.3, 0.2])
    assert digits(pattern, 20) == "01201020100120102010"
    within = [pattern.count(pattern.source(n), n) for n in range(20)]
    assert within == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4, 5, 3, 2, 6, 4, 7, 3, 8, 5, 9]
    assert digits(Mix([0.7, 0.2, 0.1]), 20) == digits(Mix([7, 2, 1]), 20) == "01020010000102001000"
    assert digits(Mix([1 / 3] * 3), 9) == "012012012"
    assert digits(Mix([0.9, 0.05, 0.05]), 20) == "01000002000000000000"
    assert digits(Take([5, 3, 2]), 10) == "0120102010"
    assert digits(Take([10, 1, 1]), 12) == "010002000000"


def test_a_mix_repeats_after_a_period() -> None:
    pattern = Mix([0.6, 0.4])
    whole = pattern.counts(PERIOD)
    assert sum(whole) == PERIOD
    assert pattern.counts(10**12 * PERIOD + 7) == [
        10**12 * c + d for c, d in zip(whole, pattern.counts(7), strict=True)
    ]
    assert pattern.source(5 * PERIOD + 3) == pattern.source(3)
    assert greedy([0.6, 0.4], 50_000)[40_000] == pattern.source(40_000)


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6), st.integers(1, 9000))
def test_a_mix_stays_within_two_samples_of_its_weights(weights: list[float], n: int) -> None:
    pattern = Mix(weights)
    counts = pattern.counts(n)
    assert sum(counts) == n
    assert all(abs(c - w * n) <= 2 for c, w in zip(counts, shares_of(weights), strict=True))
    assert counts == [pattern.count(i, n) for i in range(len(weights))]
    at = pattern.source(n)
    assert [after - before for before, after in zip(counts, pattern.counts(n + 1), strict=True)] == [
        int(i == at) for i in range(len(weights))
    ]


@given(st.lists(st.integers(1, 400), min_size=1, max_size=5), st.integers(0, 3000))
def test_a_take_has_exact_counts_and_begins_anew_behind_them(counts: list[int], n: int) -> None:
    pattern = take_pattern(counts)
    size = sum(counts)
    assert pattern.counts(size) == counts
    assert pattern.counts(n + size) == [a + b for a, b in zip(pattern.counts(n), counts, strict=True)]
    assert [pattern.count(i, n) for i in range(len(counts))] == pattern.counts(n)


def test_a_large_take_keeps_its_shares_in_every_block() -> None:
    counts = [5_000_000, 3_000_001, 7]
    pattern, size = take_pattern(counts), 8_000_008
    assert pattern.counts(size) == counts
    for block in range(1, 8):
        found = pattern.counts(block * PERIOD)
        assert sum(found) == block * PERIOD
        assert all(abs(f - c * block * PERIOD / size) < 2 for f, c in zip(found, counts, strict=True))
    end = 3 * PERIOD + 11
    assert pattern.source(end) == next(
        i for i, (a, b) in enumerate(zip(pattern.counts(end), pattern.counts(end + 1), strict=True)) if b > a
    )


@pytest.mark.parametrize("pattern", [mix_pattern([3.0]), take_pattern([9])], ids=["mix", "take"])
def test_one_source_needs_no_pattern(pattern: Pattern) -> None:
    assert (pattern.source(10**15), pattern.counts(10**15), pattern.count(0, 7)) == (0, [10**15], 7)
