"""Proper nouns stay whole: as pieces with the probability that the text gives them, and by boundaries in training."""

import math
from functools import cache
from pathlib import Path

import pytest

from megatron_ext.data.tokenizer.fertility import names_kept
from megatron_ext.data.tokenizer.model_file import BYTE, NORMAL, Model, Piece, read_model_file
from megatron_ext.data.tokenizer.names import count_names, names_in, read_names, with_names
from megatron_ext.data.tokenizer.pieces import count_tokens, sentencepiece_of
from megatron_ext.data.tokenizer.training import Training, train_sentencepiece, train_tokenizer
from megatron_ext.errors import DataError
from tests.unit.data.tokenizers import sentencepiece_model

LINES = ["東京都に住む", "京都に行く 京都", "東京都は広い", "the town of Kyoto, Kyoto", "行く都 住む京"] * 20


@cache
def model() -> Model:
    """With some pieces that can be done without."""
    made = read_model_file(train_sentencepiece(LINES, 312, Training(character_coverage=1.0)), "it")
    return made.with_pieces([*made.pieces, *(Piece(f"q{n}", -20.0 - n, NORMAL) for n in range(20))])


def cut(of: Model, text: str) -> list[str]:
    return list(sentencepiece_of(of.to_bytes(), "it").encode(text, out_type=str))


def without(of: Model, *texts: str) -> Model:
    return of.with_pieces(piece for piece in of.pieces if piece.text not in texts)


def test_names_are_found_longest_first_and_after_spaces_apart() -> None:
    assert list(names_in(["京都", "東京都", "Kyoto"], ["in Kyoto東京都", "none"])) == [
        ("in Kyoto東京都", [(3, 8), (8, 11)])
    ]
    assert count_names(["京都", "東京都", "Kyoto"], LINES[:5]) == {"東京都": 2, "京都": 1, "▁京都": 1, "▁Kyoto": 2}


def test_a_name_has_the_probability_of_the_text_and_the_size_stays() -> None:
    before = without(model(), *(piece.text for piece in model().of(NORMAL) if "京都" in piece.text))
    made = with_names(before, ["京都", "Nara"], LINES)
    assert len(made.pieces) == len(before.pieces)
    total = count_tokens(sentencepiece_of(before.to_bytes(), "it"), LINES)
    scores = {piece.text: piece.score for piece in made.of(NORMAL)}
    # 東京都 is no name here, so that its last two characters are taken for one: 3 of 4 occurrences stand alone.
    assert scores["京都"] == pytest.approx(math.log(60 / total))
    assert scores["▁京都"] == pytest.approx(math.log(20 / total))
    assert scores["Nara"] == pytest.approx(math.log(1 / total))  # which the text has not
    assert cut(made, "京都に") == ["京都", "に"]


def test_a_name_is_not_cut_out_of_a_longer_one_as_a_user_defined_symbol_would_be() -> None:
    named = with_names(model(), ["京都", "東京都"], LINES)
    assert cut(named, "東京都は") == ["東京都", "は"]
    symbol = train_sentencepiece(LINES, 312, Training(character_coverage=1.0, user_symbols=["京都"]))
    assert "京都" in cut(read_model_file(symbol, "it"), "東京都は")


def test_what_makes_room_is_never_a_character_nor_a_name() -> None:
    names = [piece.text for piece in model().of(NORMAL) if len(piece.text) > 1][-2:]
    made = with_names(model(), [*names, "Nara", "Uji"], LINES)
    texts = {piece.text for piece in made.pieces}
    assert {*names, "Nara", "Uji"} <= texts
    assert {piece.text for piece in model().pieces if len(piece.text) == 1} <= texts
    with pytest.raises(DataError, match="can make room"):
        with_names(model(), [f"Name{n}" for n in range(300)], LINES)


def test_names_that_cannot_be_pieces_are_refused() -> None:
    with pytest.raises(DataError, match="special piece"):
        with_names(model(), ["</s>"], LINES)
    with pytest.raises(DataError, match="user-defined symbol"):
        with_names(model(), ["a\nb"], LINES)
    bpe = read_model_file(sentencepiece_model(model_type="bpe"), "it")
    with pytest.raises(DataError, match="unigram"):
        with_names(bpe, ["Kyoto"], LINES)


def test_a_file_of_names(tmp_path: Path) -> None:
    (tmp_path / "names").write_bytes("\ufeff京都\r\n\n Kyoto \n京都\n".encode())
    assert read_names(tmp_path / "names") == ["京都", "Kyoto"]
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(DataError, match="has no names"):
        read_names(tmp_path / "empty")
    with pytest.raises(DataError, match="No such file"):
        read_names(tmp_path / "none")
    (tmp_path / "latin").write_bytes(b"K\xf6ln")
    with pytest.raises(DataError, match="not UTF-8 at byte 1"):
        read_names(tmp_path / "latin")


def test_no_piece_goes_across_a_delimiter_and_the_text_is_without_it(tmp_path: Path) -> None:
    """Without boundaries 先生が is a piece; with them the words are the pieces, though a delimiter follows each."""
    people, titles = ("田中", "山本", "鈴木", "田山", "高橋", "大和"), ("さん", "先生", "くん")
    parts = [(name, title, tail) for name in people for title in titles for tail in "はがとにのも"] * 3
    plain, marked = (["".join(one) for one in parts], ["||||".join(one) for one in parts])
    whole = read_model_file(train_sentencepiece(plain, 320, Training(character_coverage=1.0)), "it")
    assert any(piece.text.startswith("先生") and len(piece.text) > 2 for piece in whole.of(NORMAL))
    how = Training(character_coverage=1.0, pretokenization_delimiter="||||", names=["田中"])
    (tmp_path / "c.txt").write_text("\n".join(marked))
    tokenizer = train_tokenizer([tmp_path / "c.txt"], tmp_path / "t", 318, how)
    longer = {token for token in tokenizer.vocabulary if len(token) > 1 and not token.startswith("<")}
    assert longer == {*people, *titles}
    assert names_kept(tokenizer, plain, people) == (324, 324)
    assert tokenizer.decode(tokenizer.encode(plain[0])) == plain[0]


def test_bytes_have_no_names() -> None:
    assert all(piece.type == BYTE for piece in model().pieces if piece.text.startswith("<0x"))
    assert Piece("<0x41>", 0.0, BYTE) in model().pieces
