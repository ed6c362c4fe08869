"""Preparing data: megatron-core reads it, workers change nothing, interruptions are resumed, changes are noticed."""

import json
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

import megatron_ext.data.preprocess as module
from megatron_ext.data.preprocess import check_dataset, preprocess
from megatron_ext.data.tokenizer import Tokenizer, train_tokenizer
from megatron_ext.errors import DataError
from tests.workspace import write_corpus


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    corpus = write_corpus(directory / "c.jsonl")
    train_tokenizer([corpus], directory / "t", 330)
    preprocess([corpus], directory / "t", directory / "d", split=(0.7, 0.2, 0.1))
    return directory


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def test_megatron_core_reads_the_documents(prepared: Path) -> None:
    tokenizer = Tokenizer(prepared / "t")
    texts = {json.loads(line)["text"] for line in (prepared / "c.jsonl").read_text().splitlines()}
    read = set()
    for split in ("train", "validation", "test"):
        dataset = IndexedDataset(str(prepared / "d" / split))
        for tokens in dataset:
            assert tokens[-1] == tokenizer.eod
            read.add(tokenizer.decode(tokens[:-1].tolist()))
        assert len(dataset) == check_dataset(prepared / "d" / split, tokenizer).documents
    assert read == texts


@pytest.mark.parametrize("workers", [1, 3])
def test_number_of_workers_and_shards_changes_nothing(
    prepared: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHARD_BYTES", 5000)
    seen: list[tuple[int, int]] = []
    preprocess(
        [prepared / "c.jsonl"],
        prepared / "t",
        tmp_path / "d",
        split=(0.7, 0.2, 0.1),
        workers=workers,
        progress=lambda a, b: seen.append((a, b)),
    )
    assert files(tmp_path / "d") == files(prepared / "d")
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] == (prepared / "c.jsonl").stat().st_size


def test_an_interrupted_preparation_goes_on(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHARD_BYTES", 5000)
    real, done = module._tokenize_shard, []

    def breaks_off(job: module._Job, number: int, shard: module.Shard) -> None:
        if number == 4:
            raise KeyboardInterrupt
        done.append(number)
        real(job, number, shard)

    monkeypatch.setattr(module, "_tokenize_shard", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        preprocess([prepared / "c.jsonl"], prepared / "t", tmp_path / "d", split=(0.7, 0.2, 0.1))
    assert not (tmp_path / "d").exists()
    monkeypatch.setattr(
        module, "_tokenize_shard", lambda job, number, shard: (done.append(number), real(job, number, shard))
    )
    preprocess([prepared / "c.jsonl"], prepared / "t", tmp_path / "d", split=(0.7, 0.2, 0.1))
    assert sorted(done) == sorted(set(done)), "a finished shard was done again"
    assert files(tmp_path / "d") == files(prepared / "d")


def test_copies_of_a_document_never_stand_in_two_splits(tmp_path: Path, prepared: Path) -> None:
    lines = (prepared / "c.jsonl").read_text()
    (tmp_path / "twice.jsonl").write_text(lines + lines)
    preprocess([tmp_path / "twice.jsonl"], prepared / "t", tmp_path / "d", split=(0.5, 0.3, 0.2))
    contents = [
        {tuple(tokens.tolist()) for tokens in IndexedDataset(str(tmp_path / "d" / split))}
        for split in ("train", "validation", "test")
    ]
    assert len(set.union(*contents)) == sum(map(len, contents))


def test_a_bad_line_leaves_no_output(tmp_path: Path, prepared: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nbroken\n')
    with pytest.raises(DataError, match="bad.jsonl:2: not JSON"):
        preprocess([tmp_path / "bad.jsonl"], prepared / "t", tmp_path / "d", workers=2)
    assert not (tmp_path / "d").exists()


def test_an_existing_output_is_kept_unless_forced(prepared: Path) -> None:
    before = files(prepared / "d")
    with pytest.raises(DataError, match="exists; choose another place or pass --force"):
        preprocess([prepared / "c.jsonl"], prepared / "t", prepared / "d")
    assert files(prepared / "d") == before


def test_an_empty_corpus_is_refused(tmp_path: Path, prepared: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no text"):
        preprocess([tmp_path / "empty.jsonl"], prepared / "t", tmp_path / "d")


def test_changes_are_noticed(prepared: Path, tmp_path: Path) -> None:
    preprocess([prepared / "c.jsonl"], prepared / "t", tmp_path / "d")
    other = train_tokenizer([write_corpus(tmp_path / "c.jsonl", seed=1)], tmp_path / "other", 320)
    with pytest.raises(DataError, match="was made with another tokenizer"):
        check_dataset(tmp_path / "d" / "train", other)
    tokens = tmp_path / "d" / "train.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match="it changed after it was made"):
        check_dataset(tmp_path / "d" / "train", Tokenizer(prepared / "t"))
    with pytest.raises(DataError, match=r"nothing\.bin is missing"):
        check_dataset(tmp_path / "d" / "nothing", other)


def test_large_vocabularies_take_four_bytes() -> None:
    assert module.token_dtype(2**16) == np.uint16
    assert module.token_dtype(2**16 + 1) == np.int32


def test_an_interruption_while_cleaning_up_loses_nothing(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHARD_BYTES", 5000)
    real, removed = Path.unlink, []

    def breaks_off(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".bin" and removed:
            raise KeyboardInterrupt
        removed.extend([path] if path.suffix == ".bin" else [])
        real(path, missing_ok)

    arguments = ([prepared / "c.jsonl"], prepared / "t", tmp_path / "d")
    monkeypatch.setattr(Path, "unlink", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        preprocess(*arguments, split=(0.7, 0.2, 0.1))
    monkeypatch.setattr(Path, "unlink", real)
    assert removed
    preprocess(*arguments, split=(0.7, 0.2, 0.1))
    assert files(tmp_path / "d") == files(prepared / "d")
