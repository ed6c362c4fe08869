"""Models whose rows mean different tokens are not mixed."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer as Fast

from megatron_ext.errors import ConversionError
from megatron_ext.merging.average import AverageOptions, average
from megatron_ext.model_io.one_tokenizer import require_one_tokenizer
from megatron_ext.testing.tiny import tiny_model
from megatron_ext.upcycling.methods.mix import Mix
from megatron_ext.upcycling.options import UpcycleOptions
from megatron_ext.upcycling.plan import make_plan
from tests.support.checkpoints import write_checkpoint
from tests.unit.data.tokenizers import byte_level, unigram, write, write_settings


def checkpoints(*directories: Path) -> Any:
    return [SimpleNamespace(directory=one, companion_files=one) for one in directories]


def swapped(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def backwards(content: dict[str, Any]) -> None:
    content["model"]["merges"].reverse()


@pytest.mark.parametrize(
    ("change", "message"), [(swapped, r"token \d+ is 'a' in the first, 'b'"), (backwards, "not the merges or scores")]
)
def test_other_ids_or_readings_are_refused(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    content = json.loads(byte_level().to_str())
    change(content)
    first = write(byte_level(), tmp_path / "a")
    other = write(Fast.from_str(json.dumps(content)), tmp_path / "b")
    with pytest.raises(ConversionError, match=message) as caught:
        require_one_tokenizer(checkpoints(first, other))
    assert str(first) in str(caught.value)
    assert str(other) in str(caught.value)


def test_another_kind_is_refused_and_a_chat_model_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, none = write(byte_level(), tmp_path / "base"), tmp_path / "none"
    none.mkdir()
    chat = byte_level()
    chat.add_special_tokens(["<|tool|>"])
    write(chat, tmp_path / "chat", eos_token="<|im_end|>")
    require_one_tokenizer(checkpoints(none, base, tmp_path / "chat", base))
    assert not caplog.text
    with pytest.raises(ConversionError, match="have different tokenizers"):
        require_one_tokenizer(checkpoints(base, write(unigram(), tmp_path / "other")))
    (tmp_path / "chat" / "tokenizer.json").write_text("{")
    write_settings(tmp_path / "chat", {})
    require_one_tokenizer(checkpoints(base, tmp_path / "chat"))
    assert "are not compared" in caplog.text


def test_merging_and_mixing_ask(tmp_path: Path) -> None:
    models = [write_checkpoint(tmp_path / str(seed), tiny_model(vocab_size=350), seed=seed) for seed in range(2)]
    for model, fast in zip(models, (byte_level(), unigram()), strict=True):
        write(fast, model / "iter_0000000" / "tokenizer")
    sources, target = [str(model) for model in models], str(tmp_path / "out")
    with pytest.raises(ConversionError, match="have different tokenizers"):
        average(AverageOptions(sources=sources, target=target, logits=False))
    with pytest.raises(ConversionError, match="have different tokenizers"):
        make_plan(UpcycleOptions(sources=sources, target=target, num_experts=4, method=Mix(), logits=False))
    assert not (tmp_path / "out").exists()
