"""Prepared data is shown as it is: documents, lengths, tokens and scripts."""

import os
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.indexed import token_dtype, write_index
from megatron_ext.data.inspect.documents import Documents, show_documents, text_of
from megatron_ext.data.inspect.lengths import histogram, show_lengths
from megatron_ext.data.inspect.mix import NO_LETTERS, read_mix, script_of, show_mix
from megatron_ext.data.inspect.options import DocumentsOptions, LengthsOptions, MixOptions
from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import ConfigError, DataError
from tests.unit.data.tokenizers import byte_level, write

TEXTS = ["吾輩は猫である", "the model learns", "日本語と small text", "सूरज पूरब में"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("inspect")
    write(byte_level(), place / "tok")
    for number, text in enumerate(TEXTS):
        (place / f"{number}.txt").write_text(text)
    inputs = [place / f"{number}.txt" for number in range(len(TEXTS))]
    preprocess(inputs, place / "tok", place / "data", split=(1, 0, 0))
    return place


def test_documents_are_what_was_prepared(place: Path) -> None:
    options = DocumentsOptions(prefix=f"{place}/data/train.bin", tokenizer=str(place / "tok"), first=1, count=9)
    shown = "\n".join(show_documents(options))
    tokenizer, documents = Tokenizer(place / "tok"), Documents(place / "data" / "train")
    said = [text_of(documents[n].tolist(), tokenizer).removesuffix("<|endoftext|>") for n in range(len(documents))]
    assert sorted(said) == sorted(TEXTS)
    assert all(text in shown for text in said[1:])
    assert said[0] not in shown
    assert "is not marked" not in shown


def test_a_document_that_is_not_there_is_named(place: Path) -> None:
    options = DocumentsOptions(prefix=f"{place}/data/train", tokenizer=str(place / "tok"), first=4)
    with pytest.raises(DataError, match="no document 4; the last is 3"):
        list(show_documents(options))


def test_a_cut_file_is_named(place: Path, tmp_path: Path) -> None:
    write_index(tmp_path / "cut.idx", np.array([3, 4]), token_dtype(300))
    (tmp_path / "cut.bin").write_bytes(bytes(2 * 6))
    with pytest.raises(DataError, match=r"cut.bin has 6 tokens, its index says 7"):
        Documents(tmp_path / "cut")
    (tmp_path / "cut.bin").write_bytes(b"")
    with pytest.raises(DataError, match="0 tokens"):
        Documents(tmp_path / "cut")
    (tmp_path / "cut.idx").write_bytes(b"MMIDIDX")
    with pytest.raises(DataError, match="not an index"):
        list(show_lengths(LengthsOptions(prefixes=[str(tmp_path / "cut")])))
    (tmp_path / "cut.idx").unlink()
    os.mkfifo(tmp_path / "cut.idx")
    with pytest.raises(DataError, match=r"cut\.idx: is not a regular file"):
        list(show_lengths(LengthsOptions(prefixes=[str(tmp_path / "cut")])))


def test_lengths_fall_into_powers_of_two() -> None:
    assert histogram(np.array([2, 3, 4, 7, 8, 17])) == [(2, 2, 5), (4, 2, 11), (8, 1, 8), (16, 1, 17)]


def test_lengths_and_mix_are_drawn(place: Path, tmp_path: Path) -> None:
    prefixes = [f"{place}/data/train"]
    shown = "\n".join(
        show_lengths(LengthsOptions(prefixes=prefixes, sequence_length=8, plot=str(tmp_path / "lengths.png")))
    )
    assert "4 documents" in shown
    assert "longer than 8: " in shown
    options = MixOptions(prefixes=prefixes, tokenizer=str(place / "tok"), plot=str(tmp_path / "mix.svg"))
    assert "by script" in next(iter(show_mix(options))).lower()
    assert len(list(show_mix(options))) == 6
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "mix.svg").read_bytes()
    with pytest.raises(ConfigError, match=r"\.png, \.svg, \.pdf"):
        list(show_lengths(LengthsOptions(prefixes=prefixes, plot=str(tmp_path / "lengths.gif"))))


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("吾輩は猫である", "Han and Kana (Japanese)"),
        ("ﾊﾟｿｺﾝ", "Han and Kana (Japanese)"),
        ("我是猫", "Han"),
        ("सूरज पूरब में उगता है", "Devanagari"),
        ("Ｆｕｌｌ width and е", "Latin"),
        ("год", "Cyrillic"),
        ("1 + 1 = 2 🎉", NO_LETTERS),
        ("", NO_LETTERS),
    ],
)
def test_the_script_of_a_text(text: str, script: str) -> None:
    assert script_of(text) == script


def test_shares_of_scripts_are_by_tokens(place: Path) -> None:
    mix = read_mix(f"{place}/data/train", Tokenizer(place / "tok"), 100)
    tokens = {text: len(Tokenizer(place / "tok").encode(text)) + 1 for text in TEXTS}
    assert mix.tokens == sum(tokens.values())
    assert mix.scripts["Devanagari"] == pytest.approx(tokens[TEXTS[3]] / mix.tokens)
    assert sum(mix.scripts.values()) == pytest.approx(1)
