"""The sample of a corpus is even, bounded and the same every time."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.data.tokenizer import sample as module
from megatron_ext.data.tokenizer.sample import lines_of, sample

TEXTS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=9), max_size=60)


@given(texts=TEXTS, most=st.integers(1, 30), characters=st.integers(9, 200))
def test_a_sample_is_in_order_and_within_its_bounds(texts: list[str], most: int, characters: int) -> None:
    made = sample(texts, most, characters)
    rest = iter(texts)
    assert all(any(one == text for one in rest) for text in made.texts)
    assert len(made.texts) <= most
    assert made.characters == len("".join(made.texts)) <= characters
    assert (made.of_characters, made.of_bytes) == (len("".join(texts)), len("".join(texts).encode()))
    assert made == sample(iter(texts), most, characters)
    if len(texts) <= most and made.of_characters <= characters:
        assert made.texts == texts
        assert made.weight in (0.0, 1.0)


def test_every_text_is_as_likely() -> None:
    counts = [0] * 20
    for seed in range(2000):
        for text in sample(map(str, range(20)), 5, seed=seed).texts:
            counts[int(text)] += 1
    expected = 2000 * 5 / 20
    assert sum((count - expected) ** 2 / expected for count in counts) < 43.8  # chi squared, 19 degrees, 99.9 %


def test_no_more_than_twice_the_sample_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    smallest = module._smallest
    monkeypatch.setattr(module, "_smallest", lambda drawn, *of: (held.append(len(drawn)), smallest(drawn, *of))[1])
    made = sample(("x" * 10 for _ in range(20_000)), 100)
    assert len(made.texts) == 100
    assert max(held) <= 201
    assert made.weight == 200


@pytest.mark.parametrize("delimiter", ["", "||||"])
def test_lines_come_whole_and_are_cut_at_delimiters(delimiter: str) -> None:
    words = ["".join(pair) for pair in itertools.product("abcdefghijkl", repeat=4)]
    document = delimiter.join(words) + "\n\nshort\n"
    lines = list(lines_of([document], delimiter))
    assert "".join(lines) == document.replace("\n", "")
    assert lines[-1] == "short"
    assert max(map(len, lines)) <= 4000
    assert len(lines) > 3
    if delimiter:
        assert {word for line in lines[:-1] for word in line.split(delimiter) if word} == set(words)
