"""Data is read with the tokenizer that made it, whatever else stands in its directory."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.data.dataset import check_dataset, dataset_fingerprint
from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.data.tokenizer.record import check_record, record_of
from megatron_ext.errors import DataError
from tests.unit.data.tokenizers import byte_level, write, write_settings


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write(byte_level(), tmp_path / "t")


def test_another_end_of_documents_is_another_tokenizer(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "before <|endoftext|> <|im_end|>"}\n{"text": "<|endoftext|>"}\n')
    prefix = tmp_path / "d" / "train"
    preprocess([tmp_path / "c.jsonl"], directory, tmp_path / "d", split=(1, 0, 0))
    assert caplog.text.count("spells out the special token '<|endoftext|>'") == 1
    assert "prepare their messages with --chat" in caplog.text
    counts = check_dataset(prefix, Tokenizer(directory))
    described = json.loads((tmp_path / "d" / "dataset.json").read_text())
    assert (counts.documents, described["eod"], described["eod_token"], described["vocab_size"]) == (
        *(2, Tokenizer(directory).eod, "<|endoftext|>", 350),
    )
    before = dataset_fingerprint(prefix)
    write_settings(directory, {"eos_token": "<|im_end|>"})
    ends = r"end with token 0 \('<\|endoftext\|>'\), but those of .* end with 1 \('<\|im_end\|>'\); set eos_token"
    with pytest.raises(DataError, match=ends):
        check_dataset(prefix, Tokenizer(directory))
    preprocess([tmp_path / "c.jsonl"], directory, tmp_path / "d", split=(1, 0, 0), force=True)
    assert dataset_fingerprint(prefix) != before


def test_truncation_in_the_file_cuts_nothing(tmp_path: Path) -> None:
    fast = byte_level()
    fast.enable_truncation(8)
    fast.enable_padding(length=8)
    tokenizer = Tokenizer(write(fast, tmp_path / "t"))
    assert len(tokenizer.encode("the model learns " * 50)) > 50
    assert len(tokenizer.encode("the")) < 8


def older(directory: Path, **changes: Any) -> dict[str, Any]:
    """What data of before says, with `changes`."""
    digest = hashlib.sha256((directory / "tokenizer.json").read_bytes()).hexdigest()[:16]
    record = {"tokenizer": digest, "vocab_size": 350, "eod": 0, **changes}
    return {name: value for name, value in record.items() if value is not None}


def test_older_data_is_taken_by_what_it_says(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer(directory)
    for record in (older(directory), older(directory, eod=None), older(directory, tokenizer=None)):
        caplog.clear()
        check_record(record, tokenizer, "data/train")
        assert "data/train: made before data kept its whole tokenizer" in caplog.text
    refused = {
        "with another tokenizer": older(directory, tokenizer="0" * 16),
        "end with token 3, but": older(directory, eod=3),
        "made with 351 tokens": older(directory, vocab_size=351),
    }
    for message, record in refused.items():
        with pytest.raises(DataError, match=message):
            check_record(record, tokenizer, "data/train")
    fast = byte_level()
    fast.enable_truncation(8)
    write(fast, directory)
    with pytest.raises(DataError, match="which cut documents"):
        check_record(older(directory), Tokenizer(directory), "data/train")
    caplog.clear()
    check_record(record_of(tokenizer), Tokenizer(directory), "data/train")
    assert not caplog.text
