"""How to stop and sample, and the tokenizer, are carried along in every direction."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from megatron_ext.data.tokenizer import train_tokenizer
from megatron_ext.errors import ConversionError
from megatron_ext.manifest import MANIFEST_FILE
from megatron_ext.model_io.compare import Comparison
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.open import open_checkpoint
from megatron_ext.testing.tiny import tiny_model
from tests.support.checkpoints import MODELS, edit_config, write_checkpoint
from tests.support.workspace import write_corpus


def test_how_to_stop_and_sample_survives_both_ways(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([write_corpus(tmp_path / "corpus.jsonl")], tmp_path / "tokenizer", 320)
    source = write_checkpoint(tmp_path / "megatron", tiny_model(vocab_size=320))
    convert(source, tmp_path / "hf", tokenizer=tokenizer.directory)
    settings = GenerationConfig.from_pretrained(tmp_path / "hf")
    settings.update(eos_token_id=[2, 7], temperature=0.7, do_sample=True)
    settings.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    convert(tmp_path / "hf", tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again")
    kept = GenerationConfig.from_pretrained(tmp_path / "again")
    assert (kept.eos_token_id, kept.temperature, kept.do_sample) == ([2, 7], 0.7, True)
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_tokenizer_of_two_files_is_carried_both_ways(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """GPT-2's vocab.json and merges.txt, which transformers reads."""
    convert(write_checkpoint(tmp_path / "megatron", MODELS["dense"]), tmp_path / "hf")
    edit_config(tmp_path / "hf", eos_token_id=2)
    beside = {
        "vocab.json": json.dumps({"a": 0, "b": 1, "<|endoftext|>": 2, "ab": 3}),
        "merges.txt": "#version: 0.2\na b\n",
        "tokenizer_config.json": json.dumps({"tokenizer_class": "GPT2Tokenizer"}),
        "generation_config.json": json.dumps({"eos_token_id": [2, 3], "temperature": 0.5}, indent=2) + "\n",
        "chat_template.jinja": "{{ messages }}",
    }
    for name, content in beside.items():
        (tmp_path / "hf" / name).write_text(content)
    caplog.clear()
    convert(tmp_path / "hf", tmp_path / "back", verify=Comparison())
    convert(tmp_path / "back", tmp_path / "again")
    kept = {name: (tmp_path / "again" / name).read_text() for name in beside}
    assert (
        json.loads(kept.pop("generation_config.json")).items() >= {"eos_token_id": [2, 3], "temperature": 0.5}.items()
    )
    assert kept == {name: content for name, content in beside.items() if name in kept}
    assert AutoTokenizer.from_pretrained(tmp_path / "again").encode("ab") == [3]
    assert "is not read here" not in caplog.text
    assert "carries no tokenizer" not in caplog.text


def test_how_to_sample_survives_another_tokenizer_and_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = train_tokenizer([write_corpus(tmp_path / "corpus.jsonl")], tmp_path / "tokenizer", 320)
    convert(write_checkpoint(tmp_path / "megatron", tiny_model(vocab_size=320)), tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    caplog.clear()
    convert(tmp_path / "hf", tmp_path / "one", to="hf", tokenizer=tokenizer.directory)
    assert not caplog.messages
    convert(tmp_path / "hf", tmp_path / "none", to="hf")
    assert "the checkpoint carries no tokenizer" in caplog.text
    for name in ("one", "none"):
        assert json.loads((tmp_path / name / "generation_config.json").read_text())["temperature"] == 0.5


def test_a_tied_output_layer_that_is_stored_too_must_be_equal(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    convert(write_checkpoint(tmp_path / "megatron", MODELS["dense tied"]), tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / MANIFEST_FILE).unlink(missing_ok=True)
    save_file(
        weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, tmp_path / "hf/model.safetensors"
    )
    convert(tmp_path / "hf", tmp_path / "back")
    assert "output_layer.weight" not in open_checkpoint(tmp_path / "back").tensors.specs
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}, tmp_path / "hf/model.safetensors")
    with pytest.raises(ConversionError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
        convert(tmp_path / "hf", tmp_path / "other")


@pytest.mark.parametrize("stated", [[2, 7], [5, 7], 5])
def test_several_ids_that_end_a_text_are_kept(stated: list[int] | int, tmp_path: Path) -> None:
    tokenizer = train_tokenizer([write_corpus(tmp_path / "corpus.jsonl")], tmp_path / "tokenizer", 320)
    convert(write_checkpoint(tmp_path / "megatron", tiny_model(vocab_size=320)), tmp_path / "hf")
    edit_config(tmp_path / "hf", eos_token_id=stated)
    (tmp_path / "hf" / "generation_config.json").unlink()
    convert(tmp_path / "hf", tmp_path / "again", to="hf", tokenizer=tokenizer.directory)
    expected = stated if isinstance(stated, list) and tokenizer.eod in stated else tokenizer.eod
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "again" / name).read_text())["eos_token_id"] == expected


def test_a_tokenizer_with_code_of_its_own_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    tokenizer = train_tokenizer([write_corpus(tmp_path / "corpus.jsonl")], tmp_path / "tokenizer", 320).directory
    code = {"AutoTokenizer": ["tokenization_theirs.Theirs", None]}
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Theirs", "auto_map": code}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    (tokenizer / "tokenization_theirs.py").write_text("raise SystemExit('foreign code ran')")
    convert(write_checkpoint(tmp_path / "megatron", tiny_model(vocab_size=320)), tmp_path / "hf")
    edit_config(tmp_path / "hf", eos_token_id=5)
    convert(tmp_path / "hf", tmp_path / "again", to="hf", tokenizer=tokenizer)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == 5
    assert "token ids in the export are those of the source's config.json" in caplog.text
