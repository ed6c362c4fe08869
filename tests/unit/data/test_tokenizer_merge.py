"""Merged unigram models: probabilities of the mix, quotas of new pieces, and what does not fit together."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.data.tokenizer import Language, disagreements, fertility_lines, merge_tokenizers
from megatron_ext.data.tokenizer.merge import Part, merge_models, without_spaces
from megatron_ext.data.tokenizer.model_file import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED, Model, Piece
from megatron_ext.data.tokenizer.model_file import read_model_file as read
from megatron_ext.data.tokenizer.pieces import sentencepiece_of
from megatron_ext.data.tokenizer.sample import sample
from megatron_ext.errors import DataError
from tests.unit.data.tokenizers import sentencepiece_model


@cache
def trained(**options: Any) -> Model:
    return read(sentencepiece_model(user_defined_symbols=["\n"], pad_id=3, **options), "it")


def model(probabilities: Mapping[str, float], *more: Piece, **options: Any) -> Model:
    """A model of those normal pieces, and of more of other types."""
    base = trained(**options)
    normal = [Piece(text, math.log(p), NORMAL) for text, p in probabilities.items()]
    return base.with_pieces([*(piece for piece in base.pieces if piece.type != NORMAL), *normal, *more])


def part(name: str, of: Model, quota: int, *lines: str) -> Part:
    return Part(name, of, quota, sample(lines))


A = model({"ab": 0.3, "a": 0.3, "b": 0.2, "c": 0.1, "bc": 0.06})
B = model({"ab": 0.1, "xy": 0.3, "x": 0.2, "y": 0.2, "yx": 0.1, "xx": 0.05})


def probabilities(merged: Model) -> dict[str, float]:
    # A file has scores in single precision.
    return {piece.text: math.exp(piece.score) for piece in read(merged.to_bytes(), "it").of(NORMAL)}


def test_probabilities_are_those_of_the_mix_and_add_up() -> None:
    merged = merge_models([part("a", A, 5, "abab", "ab"), part("b", B, 5, "xy")])
    assert merged.shares == {"a": 3 / 4, "b": 1 / 4}  # of tokens: ab ab, ab; xy
    expected = {"ab": 0.75 * 0.3 + 0.25 * 0.1, "a": 0.75 * 0.3, "b": 0.75 * 0.2, "c": 0.75 * 0.1, "bc": 0.75 * 0.06}
    expected |= {"xy": 0.25 * 0.3, "x": 0.25 * 0.2, "y": 0.25 * 0.2, "yx": 0.25 * 0.1, "xx": 0.25 * 0.05}
    assert probabilities(merged.model) == pytest.approx(expected, rel=1e-6)
    ordered = [(-piece.score, piece.text) for piece in merged.model.of(NORMAL)]
    assert ordered == sorted(ordered)


def test_a_quota_counts_new_pieces_and_is_filled_from_the_next_ranks() -> None:
    """Of b the likeliest are xy, x and y, then ab, which a has brought, and yx."""
    parts = [part("a", A, 4, "ab"), part("b", B, 4, "xy")]
    merged = merge_models(parts)
    assert merged.brought == {"a": 4, "b": 4}
    assert probabilities(merged.model).keys() == {"a", "b", "c", "ab", "x", "y", "xy", "yx"}
    with pytest.raises(DataError, match=r"b: has 5 pieces .*, 6 are wanted; .* set its quota to 5"):
        merge_models([parts[0], replace(parts[1], quota=6)])
    with pytest.raises(DataError, match=r"a: has 5 pieces (?s:.*)b: has"):
        merge_models([replace(parts[0], quota=9), replace(parts[1], quota=9)])


def test_single_characters_stay_whatever_the_quota() -> None:
    pieces = probabilities(merge_models([part("a", A, 1, "ab"), part("b", B, 1, "xy")]).model)
    assert pieces.keys() == {"a", "b", "c", "x", "y"}


def test_the_order_of_equal_models_is_the_same_whatever_their_scores_ties() -> None:
    even = model(dict.fromkeys(("q", "r", "qr", "rq", "qq", "rr"), 0.1))
    once = [merge_models([part("a", even, 4, "qr"), part("b", A, 3, "ab")]).model.to_bytes() for _ in range(2)]
    turned = even.with_pieces([*(p for p in even.pieces if p.type != NORMAL), *reversed(even.of(NORMAL))])
    assert {*once, merge_models([part("a", turned, 4, "qr"), part("b", A, 3, "ab")]).model.to_bytes()} == {once[0]}


def test_what_is_no_normal_piece_stands_once_and_first() -> None:
    symbol, unused = Piece("<think>", 0.0, USER_DEFINED), Piece("zz", -3.0, UNUSED)
    special = model({"x": 0.5}, symbol, unused, Piece("ab", -1.0, UNUSED))
    merged = read(merge_models([part("a", A, 5, "ab"), part("b", special, 1, "x")]).model.to_bytes(), "it")
    kinds = [piece.type for piece in merged.pieces]
    assert [piece.text for piece in merged.pieces[:6]] == ["<unk>", "<s>", "</s>", "<pad>", "\n", "<think>"]
    assert kinds[1:6] == [CONTROL] * 3 + [USER_DEFINED] * 2
    assert kinds[6:262] == [BYTE] * 256
    assert Counter(kinds)[BYTE] == 256
    assert merged.of(UNUSED) == [unused]
    assert "ab" in probabilities(merged)  # normal in one model, unused in another
    assert merged.proto.trainer_spec.vocab_size == len(merged.pieces)


def test_scores_counted_anew_are_those_of_the_formula() -> None:
    parts = [part("a", A, 5, "abab", "abc"), part("b", B, 5, "xyxx", "\n")]
    merged = merge_models(parts, "em").model
    counts = Counter({"ab": 3, "c": 1, "xy": 1, "xx": 1})  # both rounds cut them alike
    total = sum(counts.values()) + 0.5 * 10
    expected = {text: (counts[text] + 0.5) / total for text in probabilities(merged)}
    assert probabilities(merged) == pytest.approx(expected, rel=1e-6)


def test_a_sample_stands_for_its_whole_text() -> None:
    """Nine times as much text of a as was sampled: its pieces count for as much."""
    a = part("a", A, 5, "ab")
    a = replace(a, text=replace(a.text, of_characters=18))
    assert merge_models([a, part("b", B, 5, "xy")]).shares == {"a": 0.9, "b": 0.1}


def test_spaces_of_segmented_text_go_and_probabilities_add_up() -> None:
    spaced = model({"▁ab": 0.3, "ab": 0.1, "▁": 0.2, "▁▁a": 0.1, "a": 0.05})
    assert probabilities(without_spaces(spaced)) == pytest.approx({"ab": 0.4, "▁": 0.2, "a": 0.15}, rel=1e-6)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: trained(model_type="bpe"), "b: is no unigram model"),
        (lambda: trained(normalization_rule_name="nmt_nfkc"), "b: normalises text .nmt_nfkc."),
        (lambda: trained(add_dummy_prefix=True), "add_dummy_prefix is False in a, True in b"),
        (lambda: trained(remove_extra_whitespaces=True), "remove_extra_whitespaces is False in a, True in b"),
        (lambda: trained(byte_fallback=False), "the number of byte pieces is 256 in a, 0 in b"),
        (lambda: trained(eos_piece="<eos>"), "the list of special pieces is"),
        (lambda: model({}, Piece("ab", 0.0, USER_DEFINED)), "the piece 'ab' is normal in a, user-defined in b"),
        (lambda: model({"ab": 1.0, "xy": 1.0, "x": 1.0}), r"b: its scores are no log-probabilities.*sum to 3"),
    ],
    ids=["bpe", "nfkc", "prefix", "spaces", "bytes", "special", "symbol", "scores"],
)
def test_what_does_not_fit_together_is_refused(other: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        merge_models([part("a", A, 3, "ab"), part("b", other(), 3, "xy")])


def test_files_are_merged_into_a_tokenizer_that_reads_every_language(tmp_path: Path) -> None:
    texts = {"a": "the model learns user assistant", "b": "日本語 assistant"}
    languages = {}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(f"{text}\n{text} 12\n")
        (tmp_path / f"{name}.model").write_bytes(trained().to_bytes())
        languages[name] = Language(tmp_path / f"{name}.model", 12 if name == "a" else 5, [tmp_path / f"{name}.txt"])
    made = merge_tokenizers(languages, tmp_path / "t", scores="em", names=["日本語"])
    assert disagreements(made.tokenizer, texts.values()) == []
    assert made.tokenizer.decode(made.tokenizer.encode(texts["b"])) == texts["b"]
    assert len(made.tokenizer.encode("日本語")) == 1
    again = merge_tokenizers(languages, tmp_path / "u", scores="em", names=["日本語"])
    assert again.tokenizer.fingerprint == made.tokenizer.fingerprint
    lines = fertility_lines(made.fertility)
    assert [line.split()[:2] for line in lines[1:]] == [[n, w] for n in "ab" for w in ("own", "merged")]
    with pytest.raises(DataError, match="exists"):
        merge_tokenizers(languages, tmp_path / "t")
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"b\.txt: no text of b, by which its pieces would be weighed"):
        merge_tokenizers(languages, tmp_path / "v")


def test_encoding_prefers_what_the_mix_makes_likely() -> None:
    merged = merge_models([part("a", A, 5, "ab"), part("b", B, 5, "xy")]).model
    pieces = sentencepiece_of(merged.to_bytes(), "it")
    assert pieces.encode("abxyc", out_type=str) == ["ab", "xy", "c"]
