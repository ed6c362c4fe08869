"""The four commands of docs/post_training.md as they stand there: from a Hugging Face model to a chat model."""

import json
import shlex
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_ext.config import SftTask, load_run
from megatron_ext.model_io.convert import convert
from megatron_ext.testing.tiny import tiny_model
from tests.support.checkpoints import write_checkpoint
from tests.support.commands import TOOLS, command
from tests.support.workspace import ROOT
from tests.unit.data.chats import chat_tokenizer, turns


def documented() -> list[list[str]]:
    """The first block of the guide, by arguments; torchrun's line as one process runs it."""
    block = (ROOT / "docs" / "post_training.md").read_text(encoding="utf-8").split("```")[1].strip()
    return [shlex.split(line.replace("launch/torchrun.sh", "python tools/train.py")) for line in block.splitlines()]


def test_four_commands_lead_to_a_verified_chat_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    model = tiny_model(num_layers=2, vocab_size=len(AutoTokenizer.from_pretrained(tokenizer)))
    convert(write_checkpoint(tmp_path / "megatron", model), "hf-model", tokenizer=tokenizer)
    rows = [{"messages": turns(f"What is {n} + 1?", f"It is {n + 1}.")} for n in range(40)]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    commands = documented()
    assert [Path(line[1]).stem for line in commands] == ["preprocess", "convert", "train", "convert"]
    for _, tool, *arguments in commands:
        process = command(TOOLS / Path(tool).name, *arguments)
        assert process.returncode == 0, process.stderr
    run = load_run("runs/base.yaml")
    assert isinstance(run.task, SftTask)
    assert run.checkpoint.initialize_from == "runs/base"
    assert "verdict: the same model" in process.stdout
    asked = AutoTokenizer.from_pretrained("hf-chat").apply_chat_template(
        turns("Hello?"), tokenize=False, add_generation_prompt=True
    )
    assert asked == "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"


def test_data_that_the_model_cannot_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_checkpoint(tmp_path / "megatron", tiny_model(num_layers=2))
    Path("data").mkdir()
    splits = {name: {"documents": 1, "tokens": 5000, "longest": 5000} for name in ("train", "validation")}
    Path("data/dataset.json").write_text(json.dumps({"kind": "chat", "splits": splits}), encoding="utf-8")
    for data, said in (("data", "has a sample of 5,000 tokens"), ("nowhere", "what tools/preprocess.py wrote")):
        process = command(TOOLS / "convert.py", source, "target", "--to", "megatron", "--data", data)
        assert process.returncode == 2, process.stderr
        assert said in process.stderr
    process = command(TOOLS / "convert.py", source, "target", "--data", "data")
    assert "--data needs a Megatron target" in process.stderr
    assert not Path("target").exists()
    assert not Path("target.yaml").exists()
