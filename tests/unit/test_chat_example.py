"""Rows of the chat example: what is asked later is in nothing that is trained on, and rejected answers are stuck."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.workspace import ROOT
from tests.unit.data.chats import turns

ROWS = ROOT / "examples" / "chat" / "rows.py"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_of_the_chat_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["ls -l folder", "ls", "git commit --amend --no-edit", "x" * 20, "cp -r here there"]
    chats = [{"messages": turns(f"q{n}", answers[n % 5])} for n in range(80)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    pairs = [{"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": []} for row in chats]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    monkeypatch.setattr(sys, "argv", ["rows.py", *(str(tmp_path / name) for name in ("c.jsonl", "p.jsonl", "out"))])
    runpy.run_path(str(ROWS), run_name="__main__")
    asked, kept, made = (read(tmp_path / "out" / f"{name}.jsonl") for name in ("questions", "chats", "pairs"))
    questions = {row["messages"][-1]["content"] for row in asked}
    assert len(questions) == 40
    assert len(kept) == 40
    assert not questions & {row["messages"][0]["content"] for row in kept}
    assert not questions & {row["prompt"][-1]["content"] for row in made}
    assert made
    for row in made:
        ((chosen,), (rejected,)) = ([one["content"] for one in row[name]] for name in ("chosen", "rejected"))
        assert (len(chosen) >= 16, len(rejected)) == (True, len(chosen) * 4 // 5)
        at = next(n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        assert any(
            all(rejected[n] == rejected[n - width] for n in range(at, len(rejected))) for width in range(2, 9)
        ), "the characters before it come again and again"
