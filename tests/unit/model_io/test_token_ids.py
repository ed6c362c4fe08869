"""What an export says of tokens, and that nothing of a tokenizer is lost on the way through Megatron."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import ConversionError, DataError
from megatron_ext.generation.sample import generate
from megatron_ext.model_io.compare import Comparison
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.huggingface.token_ids import check_reading, check_rows, special_tokens, write_generation
from megatron_ext.model_io.open import open_checkpoint
from megatron_ext.testing.tiny import tiny_model
from tests.support.checkpoints import edit_config, write_checkpoint
from tests.unit.data.tokenizers import byte_level, write, write_settings


def config_of(directory: Path, name: str = "config.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / name).read_text())
    return content


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    convert(write_checkpoint(tmp_path / "megatron", tiny_model(vocab_size=350)), tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").unlink()
    (tmp_path / "hf" / "manifest.json").unlink(missing_ok=True)  # a directory as others publish it
    return tmp_path / "hf"


def test_ids_and_every_file_survive_a_tokenizer_that_cannot_be_read(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_config(llama, eos_token_id=[2, 7], bos_token_id=1, pad_token_id=None)
    files = {
        "tokenizer.json": '{"version": "1.0", "added_tokens": [], "model": {"type": "NewKind"}}',
        "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["code.Theirs", null]}}',
        "code.py": "from .helper import split\nraise SystemExit('foreign code ran')\n",
        "helper.py": "split = str.split\n",
        "spiece.model": "x",
        "their.tiktoken": "IQ== 0\n",
        "vocab.txt": "a\n",
        "emoji.json": "{}",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": '{"temperature": 0.5, "eos_token_id": [2, 7]}',
    }
    for name, content in files.items():
        (llama / name).parent.mkdir(exist_ok=True)
        (llama / name).write_text(content)
    convert(llama, tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again")
    for name in files.keys() - {"generation_config.json"}:
        assert (tmp_path / "again" / name).read_text() == files[name], name
    source = tmp_path / "back" / "iter_0000000" / "tokenizer"
    assert f"{source}: cannot be read as a tokenizer" in caplog.text
    assert f"from_pretrained('{source}')" in caplog.text
    assert ".partial" not in caplog.text
    before, after = config_of(llama), config_of(tmp_path / "again")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert after[name] == before[name]
    assert config_of(tmp_path / "again", "generation_config.json")["temperature"] == 0.5
    assert config_of(tmp_path / "again", "generation_config.json")["eos_token_id"] == [2, 7]
    with pytest.raises(DataError, match="cannot be read as a tokenizer"):
        convert(llama, tmp_path / "verified", verify=Comparison())
    convert(llama, tmp_path / "replaced")
    convert(tmp_path / "replaced", tmp_path / "again", force=True)


@pytest.mark.parametrize("said", [{"bos_token_id": 1, "eos_token_id": 2}, {"eos_token_id": [5, 6]}, {}])
def test_ids_survive_without_any_tokenizer(said: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    config = config_of(llama)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config.pop(name, None)
    (llama / "config.json").write_text(json.dumps({**config, **said}))
    convert(llama, tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again")
    after = config_of(tmp_path / "again")
    assert {name: after[name] for name in said} == said
    assert all(after.get(name) is None for name in ("bos_token_id", "pad_token_id") if name not in said)


def test_the_tokenizer_of_a_run_decides_and_that_of_a_model_fills(llama: Path) -> None:
    tokenizer = load_tokenizer(write(byte_level(), llama))
    settings = {"vocab_size": 350}
    for said, decides, expected in (
        ({"eos_token_id": 7}, True, 0),
        ({"eos_token_id": 7}, False, 7),
        ({"eos_token_id": [7, 0]}, True, [7, 0]),
        ({"eos_token_id": None}, False, 0),
        ({}, False, 0),
    ):
        made = special_tokens(tokenizer, llama, said, **settings, decides=decides)
        assert made["eos_token_id"] == expected
    assert special_tokens(None, llama, {}, **settings, decides=True) == dict.fromkeys(made)
    assert "pad_token_id" not in special_tokens(None, llama, {"eos_token_id": 1}, **settings, decides=False)


def test_generation_ends_where_the_model_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "generation_config.json"
    for carried, decides, foreign, expected in (
        ({"eos_token_id": 5}, True, False, [5, 0]),
        ({"eos_token_id": 5}, False, False, 5),
        ({"eos_token_id": [5, 0]}, True, False, [5, 0]),
        ({"eos_token_id": [5, 6], "pad_token_id": 9, "suppress_tokens": [4]}, True, True, 0),
    ):
        path.write_text(json.dumps({"temperature": 0.5, **carried}))
        write_generation(path, {"eos_token_id": 0, "pad_token_id": None}, decides=decides, foreign=foreign)
        made = json.loads(path.read_text())
        assert (made["eos_token_id"], made["temperature"]) == (expected, 0.5)
    assert made.keys() == {"eos_token_id", "temperature"}
    assert "suppress_tokens are of another tokenizer and left out" in caplog.text


def test_tokens_without_a_row_are_refused_or_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fast = byte_level()
    fast.add_special_tokens(["<new>"])
    directory = write(fast, tmp_path / "t", pad_token="<pad>")  # which transformers adds, as token 351
    tokenizer = load_tokenizer(directory)
    check_rows(tokenizer, directory, 352, refuse=True)
    assert not caplog.text
    check_rows(tokenizer, directory, 350, refuse=True)
    assert "2 tokens, such as 350 ('<new>'), lie beyond the model's vocab_size, 350, and must" in caplog.text
    with pytest.raises(ConversionError, match=r"3 tokens, such as 349 .* pass --tokenizer DIR"):
        check_rows(tokenizer, directory, 349, refuse=True)
    caplog.clear()
    made = special_tokens(tokenizer, directory, {}, vocab_size=351, decides=True)
    assert made["pad_token_id"] is None
    assert "the tokenizer's pad_token_id is 351, which the model has no row for" in caplog.text


def test_a_trained_model_is_not_exported_with_a_larger_tokenizer(llama: Path, tmp_path: Path) -> None:
    larger = write(byte_level(351), tmp_path / "t")
    with pytest.raises(ConversionError, match="1 tokens, such as 350"):
        convert(llama, tmp_path / "x", to="hf", tokenizer=larger)
    assert not (tmp_path / "x").exists()


def test_a_class_that_reads_otherwise_is_said(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = load_tokenizer(write(byte_level(), llama))
    check_reading(before, llama, llama)
    assert not caplog.text
    write_settings(llama, {"tokenizer_class": "BertTokenizer", "eos_token": "<|endoftext|>"})
    check_reading(before, llama, llama)
    assert "tokenizer" in caplog.text
    assert replace(open_checkpoint(llama).content, tokenizer=None).companion_files == llama


def test_a_prompt_with_a_token_that_has_no_row_is_refused(llama: Path) -> None:
    fast = byte_level()
    fast.add_tokens(["<tool>"])
    write(fast, llama)
    how: dict[str, Any] = {"max_new_tokens": 1, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    assert len(generate(llama, ["the model"], **how)) == 1
    with pytest.raises(DataError, match=r"has token 350 \('<tool>'\), but .* embeds 350 tokens only"):
        generate(llama, ["the <tool>"], **how)
