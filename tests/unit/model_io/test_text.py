"""Token batches for comparisons, from a prepared dataset."""

import json
import tracemalloc
from pathlib import Path

import pytest
import torch

from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.data.tokenizer import train_tokenizer
from megatron_ext.errors import DataError
from megatron_ext.model_io.text import token_batches
from tests.support.workspace import write_corpus


def test_of_a_prepared_dataset_only_what_is_needed_is_read(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    tokenizer = train_tokenizer([corpus], tmp_path / "tokenizer", 320)
    preprocess([corpus], tokenizer.directory, tmp_path / "data", split=(1, 0, 0))
    prefix, file = tmp_path / "data" / "train", tmp_path / "data" / "train.bin"
    stored = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint16).long()
    before = token_batches(prefix, tokenizer, batches=3, rows=2, length=5)
    assert torch.equal(torch.stack(before).flatten(), stored[:30])
    description = json.loads((tmp_path / "data" / "dataset.json").read_text())
    with open(file, "r+b") as opened:
        opened.truncate(2**24)
    description["splits"]["train"]["tokens"] = 2**23
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(description))
    (tmp_path / "data" / "manifest.json").unlink()
    tracemalloc.start()
    after = token_batches(prefix, tokenizer, batches=3, rows=2, length=5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert peak < 2**20, "the whole file is 16 MiB"
    with pytest.raises(DataError, match="fewer than 20000000 tokens"):
        token_batches(prefix, tokenizer, batches=1, rows=2, length=10**7)
    file.write_bytes(b"")
    with pytest.raises(DataError, match="it changed after it was made"):
        token_batches(prefix, tokenizer, batches=3, rows=2, length=5)
