"""Figures of tokenizers are those that can be counted by hand, whatever the tokenizer."""

from pathlib import Path

import pytest

from megatron_ext.data.tokenizer import Tokenizer, compare_tokenizers, write_plot
from megatron_ext.data.tokenizer.fertility import Fertility, is_byte_level, kinds_of, measure, measure_tokenizer
from megatron_ext.data.tokenizer.fertility_report import consequence_lines, fertility_lines
from megatron_ext.errors import DataError
from tests.unit.data.tokenizers import LINES, byte_level, unigram, word_piece, write


def test_kinds_of_tokens() -> None:
    pieces = {"<0xE3>": 0, "a": 1, "▁": 2, "▁a": 3, "日": 4, "##s": 5, "<0x4>": 6}
    kinds = kinds_of(pieces)
    assert (kinds.fallback, kinds.single) == ({0}, {1, 2, 4, 5})
    spelt = {"Ġ": 0, "Ġa": 1, "æĹ¥": 2, "æ": 3, "Ĺ¥": 4, "a": 5, "<|日|>": 6}
    kinds = kinds_of(spelt, byte_level=True)
    assert (kinds.fallback, kinds.single) == ({3, 4}, {0, 2, 5})


def test_what_is_counted() -> None:
    kinds = kinds_of({"<0xE3>": 0, "a": 1, "ab": 2})
    one = measure(lambda text: [2, 1, 0, 0, 0], kinds, ["aba日"])
    assert one == Fertility(4, 6, 5, 3, 1, frozenset({0, 1, 2}), words=1)
    assert (one.characters_a_token, one.bytes_a_token) == (4 / 5, 6 / 5)


def test_words_are_counted_where_spaces_part_them() -> None:
    kinds = kinds_of({"a": 0})
    english, japanese = (
        measure(lambda text: [0] * 6, kinds, [text]) for text in ("two  words\nhere", "吾輩は猫である。" * 9)
    )
    assert (english.tokens_a_word, japanese.tokens_a_word) == (2.0, None)
    lines = fertility_lines({"a": {"en": english, "ja": japanese}})
    assert [line.split()[4 - number] for number, line in zip((2, 0, 0), lines, strict=True)] == [
        "tokens/word",
        "2.000",
        "-",
    ]


@pytest.mark.parametrize("kind", [byte_level, unigram, word_piece], ids=lambda kind: kind.__name__)
def test_any_tokenizer_is_measured(kind: type, tmp_path: Path) -> None:
    tokenizer = Tokenizer(write(kind(), tmp_path / "t"))
    one = measure_tokenizer(tokenizer, LINES, ["model", "日本"])
    ids = [number for line in LINES for number in tokenizer.encode(line)]
    assert (one.tokens, one.used) == (len(ids), set(ids))
    assert one.names == sum(line.count("model") + line.count("日本") for line in LINES)
    assert is_byte_level(tokenizer) == (kind is byte_level)
    assert 0 < one.names_whole <= one.names


def test_tables_and_a_plot(tmp_path: Path) -> None:
    a, b = (write(byte_level(size), tmp_path / name / "tok") for name, size in (("a", 350), ("b", 300)))
    (tmp_path / "x.txt").write_text("\n".join(LINES))
    (tmp_path / "y.txt").write_text("日本語 " * 50)
    texts = {"x": [tmp_path / "x.txt"], "y": [tmp_path / "y.txt"]}
    compared = compare_tokenizers([a, b], texts, names=["model"], max_characters=10**6)
    assert list(compared.fertility) == ["a/tok", "b/tok"]
    lines = compared.lines(64, tied=False)
    assert len({line.split()[0] for line in lines[1:5]}) == 2
    of_a = compared.fertility["a/tok"]["y"]
    assert f"{of_a.characters / of_a.tokens:.3f}" in lines[3]
    assert lines[3].endswith("-")  # a text without the names
    assert lines[-2].split() == ["a/tok", "350", *lines[-2].split()[2:4], f"{350 * 64 * 2:,}"]
    for ending in ("png", "svg"):
        write_plot(compared.fertility, tmp_path / f"f.{ending}")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="twice"):
        compare_tokenizers([a, a], texts, max_characters=10**6)
    (tmp_path / "y.txt").write_text("")
    with pytest.raises(DataError, match="no text to measure y on"):
        compare_tokenizers([a, b], texts, max_characters=10**6)


def test_what_a_vocabulary_means() -> None:
    measured = {
        "a": {"x": Fertility(100, 200, 100, 0, 0, frozenset(range(5)))},
        "b": {"x": Fertility(100, 200, 50, 0, 0, frozenset(range(10)))},
    }
    lines = consequence_lines(measured, {"a": 10, "b": 20}, {"x": 2000}, 8, tied=True)
    assert lines[1].split() == ["a", "10", "50.00%", "1,000", "80"]
    assert lines[2].split() == ["b", "20", "50.00%", "500", "-50.0%", "160"]
    assert "names" not in fertility_lines(measured)[0]
