"""Every tool, given the relative path of something missing or damaged, names it by its absolute path."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_ext.command import run_command
from megatron_ext.errors import note_path, with_absolute_paths
from tools import average, convert, corpus, generate, preprocess, prove, report, tokenizer, train, upcycle, verify
from tools import verify_checkpoint as verify_files

BROKEN = {
    "hf/config.json": "{",
    "run.yaml": "model: {num_layers: 4\ntrain: 3\n",
    "tok/tokenizer.json": "[",
    "text.jsonl": "not json\n",
    "good.jsonl": '{"text": "a"}\n',
    "figures.json": "{",
    "listed/manifest.json": "{",
    "iter_0000001/.metadata": "x",
}
COMMANDS: list[tuple[ModuleType, str, str]] = [
    (average, "hf hf out", "hf/config.json"),
    (convert, "hf out", "hf/config.json"),
    (convert, "iter_0000001 out", "iter_0000001"),
    (corpus, "--output hf", "hf"),
    (generate, "./hf --prompts a", "hf"),
    (preprocess, "good.jsonl --tokenizer tok --output out", "tok"),
    (preprocess, "text.jsonl no/where --tokenizer tok --output out", "no/where"),
    (prove, "run.yaml", "run.yaml:2"),
    (report, "--metrics a=run.yaml --figures figures.json --output r.html", "run.yaml"),
    (report, "--metrics a=lost --output r.html", "lost"),
    (tokenizer, "train text.jsonl --output out", "text.jsonl"),
    (tokenizer, "export text.jsonl --output out", "text.jsonl"),
    (train, "run.yaml --check", "run.yaml:2"),
    (upcycle, "hf/ out --num-experts 4", "hf/config.json"),
    (verify, "hf lost", "lost"),
    (verify_files, "listed", "listed/manifest.json"),
]


@pytest.mark.parametrize(("tool", "arguments", "named"), COMMANDS, ids=lambda value: getattr(value, "__name__", None))
def test_a_relative_path_is_given_absolute(
    tool: ModuleType,
    arguments: str,
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in BROKEN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [tool.__name__, *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        run_command(tool.main)
    assert ended.value.code == 2
    assert f"error: {tmp_path / named}" in capsys.readouterr().err


def test_words_that_are_no_paths_stay() -> None:
    for path in ("data", "runs/a", "./x.yaml", ".", "/abs/runs/a"):
        note_path(path)
    here = Path.cwd()
    for said, expected in {
        "data: no data in data/train": f"{here}/data: no data in {here}/data/train",
        "  data.train = 3: no": "  data.train = 3: no",
        "  data: is required": "  data: is required",
        "target (data) or 'data'": f"target ({here}/data) or '{here}/data'",
        "mv runs/a runs/a.damaged": f"mv {here}/runs/a {here}/runs/a.damaged",
        "/abs/runs/a, my-runs/a, runs/ab": "/abs/runs/a, my-runs/a, runs/ab",
        "data.partial/a, data.yaml": f"{here}/data.partial/a, {here}/data.yaml",
        "x.yaml:2:1": f"{here}/x.yaml:2:1",
        "checkpoint.directory = runs/a (= /abs/runs/a): no": "checkpoint.directory = runs/a (= /abs/runs/a): no",
    }.items():
        assert with_absolute_paths(said) == expected
