"""The tokenizer reproduces any text, and its Hugging Face form encodes alike."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_ext.data.tokenizer import Tokenizer, disagreements, train_tokenizer
from megatron_ext.errors import DataError
from tests.support.workspace import write_corpus

TEXTS = st.text(alphabet=st.characters(codec="utf-8"), max_size=60) | st.sampled_from(
    ["", " ", "\n", "a\n\n  b", "</s><s>", "<0x0A>", "日本語 123", "\t x", "***", "▁"]
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer([write_corpus(directory / "c.jsonl")], directory / "t", 330)


@settings(max_examples=200)
@given(text=TEXTS)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


@settings(max_examples=200)
@given(text=TEXTS)
def test_hugging_face_form_encodes_alike(tokenizer: Tokenizer, text: str) -> None:
    assert disagreements(tokenizer, [text]) == []


def test_transformers_loads_it(tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(tokenizer.directory)
    text = "the model learns\nevery expert 12"
    assert theirs(text).input_ids == tokenizer.encode(text)
    assert theirs.decode(theirs(text).input_ids) == text
    assert theirs.eos_token_id == tokenizer.eod
    assert len(theirs) == tokenizer.vocab_size


def test_special_tokens_are_not_read_out_of_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.eod not in tokenizer.encode("a</s>b")


def test_a_directory_with_only_the_fast_tokenizer_works(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tokenizer.directory / name).read_bytes())
    fast = Tokenizer(tmp_path)
    assert (fast.vocab_size, fast.eod) == (tokenizer.vocab_size, tokenizer.eod)
    assert fast.encode("the model") == tokenizer.encode("the model")


def test_training_repeats(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl")
    first = train_tokenizer([corpus], tmp_path / "a", 330)
    assert first.fingerprint == train_tokenizer([corpus], tmp_path / "b", 330).fingerprint
    with pytest.raises(DataError, match="exists"):
        train_tokenizer([corpus], tmp_path / "a", 330)


def test_too_large_a_vocabulary_says_what_fits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Please set it to a value <="):
        train_tokenizer([write_corpus(tmp_path / "c.jsonl")], tmp_path / "t", 5000)
    assert not (tmp_path / "t").exists()


def test_a_vocabulary_for_too_many_characters_names_our_options(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("".join(map(chr, range(0x4E00, 0x5200))))
    with pytest.raises(DataError, match=r"Increase --vocab-size or decrease --character-coverage") as refusal:
        train_tokenizer([tmp_path / "c.txt"], tmp_path / "t", 400)
    assert "character_coverage" not in str(refusal.value)


def test_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer here"):
        Tokenizer(tmp_path)
