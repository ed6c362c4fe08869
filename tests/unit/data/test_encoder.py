"""Encoding by segments gives the ids of the tokenizer's library, on any text."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hugging_face
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from megatron_ext.data.prepare import encoder as module
from megatron_ext.data.prepare import long_texts, segment_table
from megatron_ext.data.prepare.encoder import BatchEncoder, Encoder, SegmentEncoder, encoder_for
from megatron_ext.data.tokenizer import Tokenizer, Training, train_tokenizer
from tests.unit.data import tokenizers as kinds

SAMPLES = os.environ.get("MEGATRON_EXT_SAMPLE_DATA")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("t")
    corpus = directory / "c.jsonl"
    words = "the quick brown fox 吾輩は猫である。ハハハ へへへへ --- ==== aaaa      \t() सूरज पूरब </s> 1234".split(" ")
    rows = [" ".join(words[(i * k) % len(words)] for i in range(9)) + "\n" for k in range(1, 40)]
    corpus.write_text("".join(json.dumps({"text": row * 3}, ensure_ascii=False) + "\n" for row in rows))
    return train_tokenizer([corpus], directory / "t", 330)


@pytest.fixture(scope="module", params=["segments", "compiled"])
def is_much(request: pytest.FixtureRequest) -> bool:
    if request.param == "compiled":
        pytest.importorskip("numba")
    return bool(request.param == "compiled")


@pytest.fixture(scope="module")
def both(tokenizer: Tokenizer, is_much: bool) -> tuple[Encoder, BatchEncoder]:
    encoder = encoder_for(tokenizer, is_much=is_much)
    assert type(encoder).__name__ == ("PathEncoder" if is_much else "SegmentEncoder")
    return encoder, BatchEncoder(tokenizer)


def set_windows(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Characters that encoders read at once."""
    monkeypatch.setattr(module, "_BATCH", size)
    if "numba" in sys.modules:
        monkeypatch.setattr("megatron_ext.data.prepare.path_encoder._WINDOW", size)


ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
RUNS = st.lists(st.sampled_from([" ", "a", "ハ", "へ", "-", "=", "\n", "▁", "\0", "</s>", "fox", "吾輩は", "。"])).map(
    "".join
)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists((ANY | RUNS | st.tuples(RUNS, ANY).map("".join)).filter(bool), min_size=1, max_size=6))
def test_ids_are_those_of_the_library(both: tuple[Encoder, BatchEncoder], texts: list[str]) -> None:
    fast, plain = both
    assert fast.encode(texts).tolist() == plain.encode(texts).tolist()


def test_long_documents_and_a_table_that_fills_up(
    both: tuple[Encoder, BatchEncoder], tokenizer: Tokenizer, is_much: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plain = both
    set_windows(monkeypatch, 64)
    monkeypatch.setattr(segment_table, "_MOST_SEGMENTS", 20)
    draw = np.random.default_rng(1)
    words = ["fox ", "ハハハハ", "\n", "猫である", "a" * 300, " ", "é", "x\n\n", "</s>"]
    texts = ["".join(words[i] for i in draw.integers(len(words), size=n)) for n in (1, 90, 2, 400, 7, 3, 60)]
    texts += ["no line end " * 40, "ば" * 500]
    encoder = encoder_for(tokenizer, is_much=is_much)
    for _ in range(3):
        assert encoder.encode(texts).tolist() == plain.encode(texts).tolist()
        assert encoder.encode([]).tolist() == []


def test_a_long_line_is_never_held_by_the_library_as_a_whole(
    tokenizer: Tokenizer, is_much: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(3)
    words = ["fox ", "ハハハハハ", "猫である", "-----", "a" * 90, "      ", "é", "\0", "</s>"]
    text = "".join(words[i] for i in draw.integers(len(words), size=2000))
    expected = BatchEncoder(tokenizer).encode([text, "ハ" * 999]).tolist()
    set_windows(monkeypatch, 200)
    encoder, given = encoder_for(tokenizer, is_much=is_much), [0]
    read = tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode", lambda text: given.append(len(text)) or read([text])[0])
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: given.extend(map(len, texts)) or read(texts))
    assert encoder.encode([text, "ハ" * 999]).tolist() == expected
    assert max(given) < 256


SYMBOLS = ["<tool>", "<to", "xy", "yz", "★", "アイ"]


@pytest.fixture(scope="module")
def with_symbols(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("s")
    (directory / "c.txt").write_text("ハハ アイアイ tool xyzzy aaaa bcde ---- </s>\n" * 40)
    return train_tokenizer([directory / "c.txt"], directory / "t", 305, Training(user_symbols=SYMBOLS))


def test_tokens_that_are_cut_out_of_long_lines(
    with_symbols: Tokenizer, is_much: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(4)
    words = [
        *SYMBOLS,
        "xyz",
        "zyx",
        "ハハハハハ",
        "-----",
        "a" * 90,
        " ",
        "é😀",
        "\0",
        "</s>",
        "<unk>",
        "<too",
        "アアイ",
    ]
    texts = ["".join(words[i] for i in draw.integers(len(words), size=n)) for n in (9, 1500, 40, 700)]
    texts += ["a\n".join(texts), "-" * 500 + "xy" + "-" * 400]
    expected = BatchEncoder(with_symbols).encode(texts).tolist()
    set_windows(monkeypatch, 150)
    encoder, given = encoder_for(with_symbols, is_much=is_much), [0]
    assert not isinstance(encoder, BatchEncoder)
    read = with_symbols.encode_batch
    monkeypatch.setattr(with_symbols, "encode_batch", lambda texts: given.extend(map(len, texts)) or read(texts))
    for _ in range(2):
        assert encoder.encode(texts).tolist() == expected
    assert max(given) < 256


def test_compiled_code_reads_in_windows_of_any_size(with_symbols: Tokenizer) -> None:
    """Which end where every path passes, and not within a token that is cut out, or might be."""
    pytest.importorskip("numba")
    encoder, plain = encoder_for(with_symbols, is_much=True), BatchEncoder(with_symbols)
    part = st.sampled_from([*SYMBOLS, "<too", "xyz", "zyx", "aaaa", "ハハハ", " ", "\n", "\0", "é😀", "</s>"]) | ANY

    @settings(max_examples=60, deadline=None)
    @given(
        texts=st.lists(st.lists(part, min_size=1, max_size=12).map("".join).filter(bool), max_size=4),
        size=st.integers(1, 40),
    )
    def check(texts: list[str], size: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            set_windows(patch, size)
            assert encoder.encode(texts).tolist() == plain.encode(texts).tolist()

    check()


@pytest.mark.parametrize("unknown", [0.0, -99.0])
def test_control_and_byte_pieces_of_score_0(with_symbols: Tokenizer, tmp_path: Path, unknown: float) -> None:
    """As transformers writes a SentencePiece model: on the best path of a text that spells them."""
    pytest.importorskip("numba")
    content = json.loads((with_symbols.directory / "tokenizer.json").read_text())
    vocabulary, score = content["model"]["vocab"], {"<unk>": unknown}
    normal = {piece for piece, number in with_symbols.vocabulary.items() if number not in with_symbols.special_ids}
    for entry in vocabulary:
        if entry[0] not in normal or entry[0].startswith("<0x") or entry[0] in score:
            entry[1] = score.get(entry[0], 0.0)
    loaded = Tokenizer(kinds.write(hugging_face.Tokenizer.from_str(json.dumps(content)), tmp_path, eos_token="</s>"))
    encoder, plain = encoder_for(loaded, is_much=True), BatchEncoder(loaded)
    assert type(encoder).__name__ == "PathEncoder"
    part = st.sampled_from(["</s>", "<unk>", "<0x0A>", "<0xE3>", "</", "<tool>", "アイ", " ", "\n", "\0", "é😀"]) | ANY

    @settings(max_examples=60, deadline=None)
    @given(texts=st.lists(st.lists(part, min_size=1, max_size=8).map("".join).filter(bool), max_size=4))
    def check(texts: list[str]) -> None:
        assert encoder.encode(texts).tolist() == plain.encode(texts).tolist()

    check()
    for token, is_read in (("</s>", False), ("<unk>", unknown == 0.0), ("<0x0A>", True)):
        assert (loaded.vocabulary[token] in encoder.encode([f"a{token}"])[:-1]) == is_read


def test_numba_that_cannot_be_imported(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "megatron_ext.data.prepare.path_encoder", raising=False)
    monkeypatch.setitem(sys.modules, "megatron_ext.data.prepare.compiled_paths", None)
    assert isinstance(encoder_for(tokenizer, is_much=True), SegmentEncoder)


def test_what_is_new_is_noticed_once(tokenizer: Tokenizer) -> None:
    seen: list[str] = []
    encoder = encoder_for(tokenizer, lambda texts: seen.extend(texts))
    encoder.encode(["fox </s> fox", "fox"])
    encoder.encode(["fox </s> fox"])
    assert any("</s>" in text for text in seen)
    assert len(seen) == len(set(seen))


def scored(*added: hugging_face.AddedToken, unknown: float = -99.0) -> hugging_face.Tokenizer:
    """A unigram model with bytes, whose unknown piece has that score; as SentencePiece has it, 0."""
    pieces = [("<unk>", unknown), ("</s>", -99.0), *((f"<0x{byte:02X}>", -99.0) for byte in range(256))]
    pieces += [(character, -2.0 - n / 7) for n, character in enumerate("▁<>/skunabcde")]
    tokenizer = hugging_face.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.add_tokens(list(added))
    return tokenizer


def plain(content: str, *, normalized: bool = False) -> hugging_face.AddedToken:
    return hugging_face.AddedToken(content, special=False, normalized=normalized)


@pytest.mark.parametrize(
    ("tokenizer", "text", "pieces"),
    [
        (scored(unknown=0.0), "a<unk>b", ["a", "<unk>", "b"]),
        (scored(unknown=0.0), "\t<unk>", ["<0x09>", *(f"<0x{byte:02X}>" for byte in b"<unk>")]),
        (scored(plain("s>")), "as></s>", ["a", "s>", "<", "/", "s", ">"]),  # passed over with "</s>"
        (scored(plain(">a")), ">a </s>a", [">a", "▁", "<", "/", "s", ">", "a"]),
        (scored(plain("ab", normalized=True), plain("bc")), "abd abc", ["ab", "d", "▁", "a", "bc"]),
        (scored(plain("b c"), plain("d▁e", normalized=True)), "b c b▁cd e", ["b c", "▁", "b", "▁", "c", "d▁e"]),
    ],
)
def test_tokens_that_the_library_reads_by_what_stands_around_them(
    tokenizer: hugging_face.Tokenizer, text: str, pieces: list[str], tmp_path: Path
) -> None:
    loaded = Tokenizer(kinds.write(tokenizer, tmp_path, eos_token="</s>", unk_token="<unk>"))
    encoder, expected = encoder_for(loaded, is_much=True), [loaded.vocabulary[piece] for piece in pieces]
    assert not isinstance(encoder, BatchEncoder)
    assert loaded.encode(text) == expected
    assert encoder.encode([text, text]).tolist() == [*expected, loaded.eod] * 2


def merging(directory: Path) -> Tokenizer:
    """As Llama 2 without its space in front: merges, and bytes for what is unknown."""
    found = hugging_face.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    special = ["<unk>", "<|endoftext|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    found.train_from_iterator(kinds.LINES, trainers.BpeTrainer(vocab_size=420, special_tokens=special))
    content = json.loads(found.to_str())
    content["added_tokens"] = content["added_tokens"][:2]  # bytes are pieces of the model alone
    return Tokenizer(kinds.write(hugging_face.Tokenizer.from_str(json.dumps(content)), directory))


def test_merges_are_read_by_segments_too(tmp_path: Path) -> None:
    tokenizer = merging(tmp_path)
    fast, plain = encoder_for(tokenizer), BatchEncoder(tokenizer)
    assert isinstance(fast, SegmentEncoder)
    texts = [*kinds.LINES, "aaaaaaa  é日本語本日 <|endoftext|> <0x0A>", "ハ\n\n\nハハ"]
    for _ in range(2):
        assert fast.encode(texts).tolist() == plain.encode(texts).tolist()


@pytest.mark.parametrize("make", [kinds.byte_level, kinds.unigram, kinds.word_piece], ids=lambda make: make.__name__)
def test_tokenizers_that_look_around_them_are_read_by_the_library(
    make: Callable[[], hugging_face.Tokenizer], tmp_path: Path
) -> None:
    tokenizer = Tokenizer(kinds.write(make(), tmp_path, unk_token=None))
    encoder = encoder_for(tokenizer)
    assert isinstance(getattr(encoder, "_encoder", encoder), BatchEncoder)
    expected = [ids for line in kinds.LINES for ids in (*tokenizer.encode(line), tokenizer.eod)]
    assert encoder.encode(kinds.LINES).tolist() == expected


def test_long_documents_are_read_by_the_library_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(kinds.write(kinds.byte_level(), tmp_path))
    texts = ["short", "fox 日本 " * 40, "x" * 99, "a fox\n" * 30, "end"]
    expected = [number for text in texts for number in (*tokenizer.encode(text), tokenizer.eod)]
    monkeypatch.setattr(module, "PART", 50)
    monkeypatch.setattr(long_texts, "PART", 50)
    assert BatchEncoder(tokenizer).encode(texts).tolist() == expected


@pytest.mark.skipif(SAMPLES is None, reason="needs the sample corpora")
def test_sample_corpora(tokenizer: Tokenizer, both: tuple[Encoder, BatchEncoder]) -> None:
    fast, plain = both
    for path in sorted(Path(SAMPLES or "", "corpus").glob("*.jsonl")):
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()[:150]]
        assert np.array_equal(fast.encode(texts), plain.encode(texts)), path
