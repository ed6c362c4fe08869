"""tools/tokenizer.py: models of two languages, merged, measured and extended, and what it says of wrong options."""

import sys
from pathlib import Path

import pytest

from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import ConfigError, DataError
from tests.support.workspace import write_corpus
from tools import tokenizer as tool


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)

    def command(line: str) -> str:
        monkeypatch.setattr(sys, "argv", ["tokenizer.py", *line.split()])
        tool.main()
        return capsys.readouterr().out

    return command


def test_from_text_of_two_languages_to_a_tokenizer_with_more_tokens(run, tmp_path: Path) -> None:
    write_corpus(tmp_path / "a.jsonl")
    places, verbs = ("東京都", "京都", "大阪", "名古屋", "神戸"), ("に住む人", "へ行く", "は広い", "から来る", "を見る")
    (tmp_path / "b.txt").write_text(
        "\n".join(f"{place}{verb} {n}" for n in range(9) for place in places for verb in verbs)
    )
    (tmp_path / "names").write_text("東京都\n")
    run("train a.jsonl --output a --vocab-size 330")
    run("export a --output again")
    assert Tokenizer(tmp_path / "again").fingerprint == Tokenizer(tmp_path / "a").fingerprint
    with pytest.raises(DataError, match=r"nothing: no such file; expected a SentencePiece model, or the folder of a"):
        run("export nothing --output b")
    run("train b.txt --output b --vocab-size 316 --character-coverage 1 --user-symbols <x>")
    out = run("merge a=a b=b --quota a=60,b=20 --text a=a.jsonl b=b.txt --output ab --names names --scores em --joint")
    merged = Tokenizer(tmp_path / "ab")
    assert "a: 60 pieces" in out
    assert ["b", "joint"] in [line.split()[:2] for line in out.splitlines()]
    assert "b  merged" in out
    assert f"{merged.vocab_size} tokens, end of document is 2" in out
    assert "<x>" in merged.vocabulary
    assert len(merged.encode("東京都")) == 1
    out = run("compare ab a --text a=a.jsonl b=b.txt --names names --hidden-size 8 --tied --plot f.svg")
    assert "names whole" in out
    assert f"{330 * 8:,}" in out
    assert (tmp_path / "f.svg").read_text().lstrip().startswith("<?xml")
    out = run("extend ab more --tokens <|im_start|> --special")
    assert f"1 tokens more, with the ids {merged.vocab_size} to {merged.vocab_size}" in out
    assert Tokenizer(tmp_path / "more").vocab_size == merged.vocab_size + 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("merge a=a b --quota a=1,b=1 --text a=a b=b --output o", r"models = 'b': expected NAME=PATH"),
        ("merge a=a b=b --quota a=1 --text a=a b=b --output o", "quota: has nothing for b"),
        ("merge a=a b=b --quota a=1,b=0 --text a=a b=b --output o", "quota = 'a=1,b=0': expected a number"),
        ("merge a=a b=b --quota a=1,b=2,a=3 --text a=a b=b --output o", "expected a number"),
        ("merge a=a b=b --quota a=1,b=2 --text a=a c=b --output o", "text names c, but the models are a, b"),
        ("merge a=a a=b --quota a=1 --text a=a --output o", "'a' is named twice"),
        ("merge a=a b=b --quota a=1,b=2 --text a=a b=b --output o --strip-spaces c", "strip_spaces names c"),
        ("compare a --text a=a --plot f.xyz", r"plot = f.xyz: expected a name that ends in .png, .svg, .pdf"),
        ("compare a --text a", "text = 'a': expected NAME=PATH, such as ja=a"),
        ("extent a", "no such command; did you mean extend"),
    ],
)
def test_wrong_options_are_named(run, line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(line)
