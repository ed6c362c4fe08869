"""A SentencePiece model is exported only where Hugging Face's fast tokenizer is seen to encode alike."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.data.tokenizer import disagreements, write_tokenizer
from megatron_ext.errors import DataError
from tests.unit.data.tokenizers import LINES, sentencepiece_model

EXPORTED: dict[str, dict[str, Any]] = {
    "as ours": {"allow_whitespace_only_pieces": True, "user_defined_symbols": ["\n"], "pad_id": 3},
    "no pad": {},
    "no bytes": {"byte_fallback": False},
    "other names": {"eos_piece": "<eos>", "bos_piece": "<bos>", "pad_id": 3, "pad_piece": "<Fill>"},
    "BPE": {"model_type": "bpe"},
    "BPE, symbols": {"model_type": "bpe", "user_defined_symbols": ["\n", "<think>", "▁▁", "▁▁▁▁"]},
    "BPE, dummy prefix": {"model_type": "bpe", "add_dummy_prefix": True, "allow_whitespace_only_pieces": True},
}


@pytest.mark.parametrize("kind", EXPORTED)
def test_what_encodes_alike_is_exported(kind: str, tmp_path: Path) -> None:
    options = {"required_chars": "<>/0123456789ABCDEFxsunkpadeobFil", **EXPORTED[kind]}
    tokenizer = write_tokenizer(sentencepiece_model(**options), tmp_path / "t", LINES)
    assert disagreements(tokenizer, ["  the  model\n", "日本語", "</s>", "<0x41>", *LINES]) == []
    settings = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    assert settings["padding_side"] == "left"
    assert settings["add_prefix_space"] == ("prefix" in kind)
    named = {settings[f"{name}_token"] for name in ("unk", "bos", "eos", "pad") if f"{name}_token" in settings}
    assert named <= tokenizer.vocabulary.keys()
    assert ("pad_token" in settings) == (options.get("pad_id", -1) >= 0)
    assert settings["eos_token"] == options.get("eos_piece", "</s>")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "normalisation": (
        {"normalization_rule_name": "nmt_nfkc"},
        r"\(it normalises text by nmt_nfkc\): this model cannot",
    ),
    "removed spaces": ({"remove_extra_whitespaces": True}, r"\(it removes spaces .*\): this model cannot be exported"),
    "unigram, dummy prefix": ({"add_dummy_prefix": True}, r"\(it puts a space in front .*\): this model cannot be"),
    "symbols of spaces": ({"user_defined_symbols": ["▁▁▁"]}, "user-defined symbol '▁▁▁' has spaces"),
    "no end": ({"eos_id": -1}, "has no end-of-sentence piece"),
    "words": ({"model_type": "word"}, "this model cannot be exported"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_is_refused_and_nothing_is_written(kind: str, tmp_path: Path) -> None:
    options, message = REFUSED[kind]
    with pytest.raises(DataError, match=message):
        write_tokenizer(sentencepiece_model(**options), tmp_path / "t", [])
    assert not (tmp_path / "t").exists()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"IQ== 0\nIg== 1\n", "but a tiktoken list"),
        (b"", "but empty"),
        (b"nothing", "or cut or damaged"),
    ],
)
def test_what_is_no_model_is_said(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"the model: not a SentencePiece model.*{message}"):
        write_tokenizer(content, tmp_path / "t", [])
    assert not (tmp_path / "t").exists()
