"""Texts that the tokenizers library reads in parts have the ids of the whole, wherever they may be cut."""

import io
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer

from megatron_ext.data.prepare import encoder, long_texts
from megatron_ext.data.prepare.long_texts import LongTexts
from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.data.prepare.regex_pairs import NotUnderstoodError, RegexPairs
from megatron_ext.data.prepare.shard_work import TextOptions
from megatron_ext.data.prepare.text_cuts import TextCuts, text_cuts
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.data.tokenizer.model_file import read_model_file
from megatron_ext.errors import DataError
from tests.unit.data import tokenizers as kinds

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
EXTRA = ["吾輩は猫である。名前はまだ無い、", "it's 12345 don't WE'LL", "  x  \n\n y = {1: 'a'}", "सूरज पूरब में"]


def merging(*splits: pre_tokenizers.PreTokenizer, is_bytes: bool = True) -> Library:
    """Of bytes, behind `splits`; or as SentencePiece's, whose words are split by nothing else."""
    tokenizer = Library(models.BPE() if is_bytes else models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if is_bytes:
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    special = ["<|endoftext|>", "<unk>", *([] if is_bytes else [f"<0x{byte:02X}>" for byte in range(256)])]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if is_bytes else []
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*kinds.LINES, *EXTRA * 9], trainer)
    if not is_bytes:
        (tokenizer.pre_tokenizer,) = splits or [pre_tokenizers.Sequence([])]
    return tokenizer


def splitting(*patterns: str) -> Library:
    return merging(*(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns))


def with_space_in_front() -> Library:
    """As Llama 2."""
    tokenizer = merging(is_bytes=False)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_tokens([AddedToken("fox", normalized=False)])
    return tokenizer


def replacing() -> Library:
    """As Gemma."""
    tokenizer = merging(is_bytes=False)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
    return tokenizer


def with_digits_apart() -> Library:
    """As StarCoder, with GPT-2's option of a space in front."""
    tokenizer = kinds.byte_level(600)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=True)])
    return tokenizer


def normalizing(mark: str, *splits: pre_tokenizers.PreTokenizer) -> Library:
    """As T5 and XLM-R: characters as SentencePiece writes them, runs of spaces as one, words by spaces."""
    model = io.BytesIO()
    lines = [line for text in [*kinds.LINES, *EXTRA] for line in text.split("\n") if line.strip()]
    options = {"vocab_size": 300, "hard_vocab_limit": False, "minloglevel": 2, "normalization_rule_name": "nmt_nfkc"}
    SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    read = read_model_file(model.getvalue(), "m")
    pieces = [("<|endoftext|>", 0.0), *((piece.text, piece.score) for piece in read.pieces if piece.text != "</s>")]
    tokenizer = Library(models.Unigram(pieces, unk_id=1))
    characters = normalizers.Precompiled(read.proto.normalizer_spec.precompiled_charsmap)
    tokenizer.normalizer = normalizers.Sequence([characters, normalizers.Replace(Regex(" {2,}"), mark)])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.Metaspace(prepend_scheme="always")])
    tokenizer.add_special_tokens(["<|endoftext|>", "<unk>"])
    return tokenizer


MADE: dict[str, Callable[[], Library]] = {
    "GPT-2": lambda: kinds.byte_level(600),
    "Llama 3": lambda: splitting(LLAMA3),
    "o200k": lambda: splitting(kinds.O200K),
    "DeepSeek": lambda: splitting(*DEEPSEEK),
    "StarCoder": with_digits_apart,
    "Llama 2": with_space_in_front,
    "Gemma": replacing,
    "Mistral": lambda: merging(pre_tokenizers.Metaspace(prepend_scheme="first", split=False), is_bytes=False),
    "T5": lambda: normalizing("▁"),
    "XLM-R": lambda: normalizing(" ", pre_tokenizers.WhitespaceSplit()),
    "NFKC": lambda: kinds.unigram(normalizers.NFKC()),
}
WORDS = [
    *(
        "fox",
        "the",
        "WE'LL",
        "it's",
        "a",
        "x" * 9,
        "吾輩は猫である",
        "日本語",
        "。",
        "、",
        "ハ",
        "ｶﾞ",
        "カ\u3099",
        "é",
        "e\u0301",
    ),
    *(
        "सूरज",
        "क्षि",
        "1",
        "12345",
        "²",
        " ",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u3000",
        "\u00a0",
        "'",
        "'s",
        "--",
        "()",
        "=",
        "/",
    ),
    *(
        "▁",
        "Ġ",
        "😀",
        "👩\u200d👧",
        "각",
        "\u1100\u1161",
        "<|endoftext|>",
        "<unk>",
        "\x00",
        "\ufeff",
        "\u200b",
        "ำ",
        "ſ",
        "Σς",
    ),
]
TEXTS = st.lists(st.sampled_from(WORDS) | st.characters(exclude_categories=["Cs"]), min_size=2, max_size=9).map("".join)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Tokenizer, TextCuts]]:
    @cache
    def make(name: str) -> tuple[Tokenizer, TextCuts]:
        folder = tmp_path_factory.mktemp("t")
        tokenizer = Tokenizer(kinds.write(MADE[name](), folder))
        cuts = text_cuts(tokenizer)
        assert cuts is not None
        return tokenizer, cuts

    return make


def assert_cuts_are_right(tokenizer: Tokenizer, cuts: TextCuts, text: str) -> int:
    """Whether parts have the ids of the whole, at each place; how many there are."""
    whole, count = tokenizer.encode(text), 0
    for at in range(1, len(text)):
        cut = cuts.first(text, at - 1, at)
        if cut is None:
            continue
        left, right = tokenizer.encode(text[: cut.stop]), tokenizer.encode(text[cut.begin :])
        if cut.is_sure or (left and right and cuts.stay_apart(left[-1], right[0])):
            assert left + right == whole, (text, cut)
            count += 1
    return count


@pytest.mark.parametrize("name", MADE)
def test_parts_have_the_ids_of_the_whole(made: Callable[[str], tuple[Tokenizer, TextCuts]], name: str) -> None:
    tokenizer, cuts = made(name)

    @settings(max_examples=60, deadline=None)
    @given(text=TEXTS)
    def check(text: str) -> None:
        assert_cuts_are_right(tokenizer, cuts, text)

    check()
    text = "the quick fox it's 12345 x 吾輩は猫である。名前は、まだ無い sun rises"
    assert assert_cuts_are_right(tokenizer, cuts, text) > 4
    if name not in ("Llama 2", "Mistral", "StarCoder", "NFKC"):  # parts of these begin where there is a space
        assert assert_cuts_are_right(tokenizer, cuts, "吾輩は猫である。\n名前はまだ無い") > 0


@pytest.mark.parametrize("name", MADE)
def test_long_texts_are_read_in_parts(
    made: Callable[[str], tuple[Tokenizer, TextCuts]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, _ = made(name)
    text = "the quick fox it's 12345 x 吾輩は猫である。名前は、まだ無い sun  rises\n" * 40
    whole, given = tokenizer.encode(text), []
    monkeypatch.setattr(long_texts, "PART", 64)
    read = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: given.append(len(text)) or read(text))
    assert [number for part in LongTexts(tokenizer).ids(text) for number in part.tolist()] == whole
    assert max(given) <= 512


def test_one_word_that_merges_is_read_in_parts(made: Callable[[str], tuple[Tokenizer, TextCuts]]) -> None:
    tokenizer, _ = made("Gemma")
    text = "x" * 70_000 + "吾輩は猫である" * 20_000
    assert [number for part in LongTexts(tokenizer).ids(text) for number in part.tolist()] == tokenizer.encode(text)


def test_of_steps_that_are_not_understood_lines_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = kinds.byte_level()
    scripts = pre_tokenizers.UnicodeScripts()
    library.pre_tokenizer = pre_tokenizers.Sequence([scripts, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer = Tokenizer(kinds.write(library, tmp_path))
    assert text_cuts(tokenizer) is None
    parts = ["fox", "\n", "\n", "  ", "a", "日本", "=", "<|im_end|>", "1"]
    text = "".join(random.Random(2).choices(parts, k=3000))
    monkeypatch.setattr(long_texts, "PART", 50)
    monkeypatch.setattr(long_texts, "_AROUND", 40)
    read = LongTexts(tokenizer).ids(text)
    assert len(read) > 50
    assert [number for part in read for number in part.tolist()] == tokenizer.encode(text)


def test_one_word_of_a_whole_text_is_refused(
    made: Callable[[str], tuple[Tokenizer, TextCuts]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_texts, "PART", 64)
    monkeypatch.setattr(long_texts, "_LONGEST", 1000)
    long = LongTexts(made("GPT-2")[0])
    assert long.why_not("fox " * 900) is None
    assert long.why_not("a fox " + "x" * 999) is None
    assert (long.why_not("a fox " + "x" * 1001 + " fox") or "").startswith("1,002 characters in which this tokenizer")


@pytest.fixture(scope="module", params=["Llama 2", "Mistral"])
def spaced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One that puts a space in front, and has no tokens but the special ones."""
    library = merging(is_bytes=False) if request.param == "Llama 2" else MADE["Mistral"]()
    if request.param == "Llama 2":
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    folder = kinds.write(library, tmp_path_factory.mktemp("t"))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = content["added_tokens"][:2]  # bytes are pieces of the model alone
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer(folder)


def test_a_text_with_the_space_that_is_put_in_front_of_it(spaced: Tokenizer) -> None:
    found, read = encoder.encoder_for(spaced), AutoTokenizer.from_pretrained(spaced.directory)
    assert isinstance(found, encoder.SpacedEncoder)

    @settings(max_examples=60, deadline=None)
    @given(texts=st.lists(TEXTS, min_size=1, max_size=4))
    def check(texts: list[str]) -> None:
        whole = [read(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in texts]
        assert found.encode(texts).tolist() == [number for ids in whole for number in (*ids, spaced.eod)]

    check()


def test_text_without_spaces_is_no_single_word(spaced: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tokenizer that puts a space in front of a text, which a part must not have."""
    text = "吾輩は猫である。名前はまだ無い、" * 300
    read = AutoTokenizer.from_pretrained(spaced.directory)
    whole = read(text, add_special_tokens=False).input_ids
    for module, size in ((long_texts, 64), (encoder, 64)):
        monkeypatch.setattr(module, "PART", size)
    monkeypatch.setattr(encoder, "_BATCH", 100)
    monkeypatch.setattr(long_texts, "_LONGEST", 1000)
    given, encode, encode_batch = [0], Tokenizer.encode, Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode", lambda own, text: given.append(len(text)) or encode(own, text))
    monkeypatch.setattr(
        Tokenizer, "encode_batch", lambda own, texts: given.extend(map(len, texts)) or encode_batch(own, texts)
    )
    found = encoder.encoder_for(spaced)
    given.clear()
    assert found.why_not(text) is None
    assert found.encode([text]).tolist() == [*whole, spaced.eod]
    assert max(given) <= 300
    assert encoder.BatchEncoder(spaced).why_not(text) is not None, "it would be refused as it is"


def test_a_document_of_one_word_is_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds.write(MADE["GPT-2"](), tmp_path / "t")
    monkeypatch.setattr(long_texts, "PART", 64)
    monkeypatch.setattr(encoder, "PART", 64)
    monkeypatch.setattr(long_texts, "_LONGEST", 1000)
    texts = ["a fox", "x" * 2000, "the fox " * 300]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ([tmp_path / "c.jsonl"], tmp_path / "t", tmp_path / "d")
    with pytest.raises(DataError, match=r"c\.jsonl:2: 2,000 characters in which this tokenizer sees one word"):
        preprocess(*arguments)
    made = preprocess(*arguments, options=TextOptions(bad_lines="skip", split=(1, 0, 0)))
    assert made["train"].documents == 2
    assert json.loads((tmp_path / "d" / "dataset.json").read_text())["left_out"]["bad line"] == 1


@pytest.mark.parametrize(
    "pattern", ["(?<=a)b", "^a", r"a\b", r"(a)\1", "a*", "(?=ab)c", r"[a&&b]", r"\p{Han}", "(a", "a{x}"]
)
def test_expressions_that_are_not_followed(pattern: str) -> None:
    with pytest.raises(NotUnderstoodError):
        RegexPairs(pattern)
