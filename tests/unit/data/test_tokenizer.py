"""The tokenizer reproduces any text, and its Hugging Face form encodes alike."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_ext.data.tokenizer import (
    Language,
    Tokenizer,
    Training,
    disagreements,
    merge_tokenizers,
    train_tokenizer,
)
from megatron_ext.data.tokenizer.training import train_sentencepiece
from megatron_ext.errors import DataError
from tests.support.workspace import write_corpus

TEXTS = st.text(alphabet=st.characters(codec="utf-8"), max_size=60) | st.sampled_from(
    [
        "",
        " ",
        "\n",
        "a\n\n  b",
        "</s><s>",
        "<0x0A>",
        "<unk>",
        "日本語 123",
        "\t x",
        "***",
        "▁",
        "<think>",
        "<0xED><0xA0>",
    ]
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer([write_corpus(directory / "c.jsonl")], directory / "t", 330)


@pytest.fixture(scope="module")
def others(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    """Of BPE, and merged, with a name."""
    directory = tmp_path_factory.mktemp("others")
    corpus = write_corpus(directory / "c.jsonl")
    bpe = train_tokenizer([corpus], directory / "bpe", 330, Training(model_type="bpe", user_symbols=["<think>"]))
    model = tokenizer.directory / "tokenizer.model"
    languages = {name: Language(model, quota, [corpus]) for name, quota in (("a", 50), ("b", 5))}
    return [bpe, merge_tokenizers(languages, directory / "merged", names=["日本語"]).tokenizer]


@settings(max_examples=150)
@given(text=TEXTS)
def test_hugging_face_form_encodes_alike(tokenizer: Tokenizer, others: list[Tokenizer], text: str) -> None:
    for one in (tokenizer, *others):
        assert disagreements(one, [text]) == []
        assert one.decode(one.encode(text)) == text.replace("▁", " ")


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


def test_a_corpus_without_text_is_named(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", ""), ("b.jsonl", '{"text": " \\n"}\n')):
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=r"a\.jsonl and 1 more: no text to train on"):
        train_tokenizer([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "t", 330)
    assert not list(tmp_path.glob("t*"))


def test_lines_that_cannot_be_read_are_left_out_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl")
    good, *more = corpus.read_text().splitlines(keepends=True)
    (tmp_path / "bad.jsonl").write_text("".join([good, "broken\n", '{"text": 5}\n', *more]))
    with pytest.raises(DataError, match=r"bad\.jsonl:2: not JSON .*; --bad-lines skip leaves such documents out"):
        train_tokenizer([tmp_path / "bad.jsonl"], tmp_path / "t", 330)
    found = train_tokenizer([tmp_path / "bad.jsonl"], tmp_path / "t", 330, bad_lines="skip")
    assert re.search(r"^2 left out: 2 bad line\n  .*bad.jsonl:2: .*\n  .*bad.jsonl:3: ", capsys.readouterr().err, re.M)
    assert found.fingerprint == train_tokenizer([corpus], tmp_path / "good", 330).fingerprint


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
    with pytest.raises(DataError, match=r"gpt2: no tokenizer here \(no such folder; .*`hf download` it first\)"):
        Tokenizer(tmp_path / "gpt2")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a folder; give the one that holds the tokenizer's files"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_what_training_offers(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl")
    kinds = {
        "bpe": Training(model_type="bpe", user_symbols=["<think>", "a,b"]),
        "whole numbers": Training(split_digits=False),
        "no bytes": Training(byte_fallback=False, max_lines=400, max_characters=100_000),
    }
    sizes = {"no bytes": 70}
    made = {name: train_tokenizer([corpus], tmp_path / name, sizes.get(name, 340), how) for name, how in kinds.items()}
    bpe = made["bpe"]
    assert [bpe.vocabulary[symbol] for symbol in ("\n", "<think>", "a,b")] == [4, 5, 6]
    assert bpe.encode("x<think>a,b") == [*bpe.encode("x"), 5, 6]
    assert bpe.decode(bpe.encode("12 every\n日本語 ∰")) == "12 every\n日本語 ∰"
    assert any(token.strip("▁").isdigit() and len(token) > 1 for token in made["whole numbers"].vocabulary)
    assert not any(token.strip("▁").isdigit() and len(token.strip("▁")) > 1 for token in bpe.vocabulary)
    assert made["no bytes"].encode("∰") == [0]
    assert not any(token.startswith("<0x") for token in made["no bytes"].vocabulary)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Training(user_symbols=["a b"]), "'a b' is empty, not UTF-8 or has spaces"),
        (Training(user_symbols=["\udcff"]), "not UTF-8"),
        (Training(user_symbols=["▁x"]), "has spaces"),
        (Training(user_symbols=["<x>", "<x>"]), "'<x>' is a piece already"),
        (Training(user_symbols=["</s>"]), "is a piece already"),
        (Training(pretokenization_delimiter=" "), "is white space"),
        (Training(model_type="bpe", names=["Kyoto"]), "names need a unigram model"),
    ],
)
def test_what_cannot_be_trained_is_said_before_the_work(how: Training, message: str) -> None:
    def no_text() -> Iterator[str]:
        raise AssertionError("the text is read")
        yield ""

    with pytest.raises(DataError, match=message):
        train_sentencepiece(no_text(), 330, how)
