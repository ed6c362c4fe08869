"""Preparing data: megatron-core reads it, workers change nothing, interruptions are resumed, changes are noticed."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

import megatron_ext.data.prepare.preprocess as module
from megatron_ext.data.dataset import check_dataset, dataset_fingerprint
from megatron_ext.data.indexed import token_dtype
from megatron_ext.data.prepare import shard_work
from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.data.prepare.shard_work import ShardWorker, Task
from megatron_ext.data.tokenizer import Tokenizer, train_tokenizer
from megatron_ext.errors import DataError
from megatron_ext.files import OURS
from megatron_ext.manifest import check_manifest
from tests.support.workspace import write_corpus


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
    monkeypatch.setattr(module, "_MOST_HERE", 0)
    monkeypatch.setattr(module, "_worker", None)
    seen: list[tuple[int, int]] = []
    preprocess(
        [prepared / "c.jsonl"],
        prepared / "t",
        tmp_path / "d",
        split=(0.7, 0.2, 0.1),
        workers=workers,
        progress=lambda a, b, note: seen.append((a, b)),
    )
    assert files(tmp_path / "d") == files(prepared / "d")
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] == (prepared / "c.jsonl").stat().st_size
    assert module._worker is None, "one worker is a process of its own too"


def test_an_interrupted_preparation_goes_on(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHARD_BYTES", 5000)
    real, done = ShardWorker.do, []

    def breaks_off(worker: ShardWorker, task: Task) -> None:
        if task.number == 4:
            raise KeyboardInterrupt
        done.append(task.number)
        real(worker, task)

    monkeypatch.setattr(ShardWorker, "do", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        preprocess([prepared / "c.jsonl"], prepared / "t", tmp_path / "d", split=(0.7, 0.2, 0.1))
    assert not (tmp_path / "d").exists()
    monkeypatch.setattr(ShardWorker, "do", lambda worker, task: (done.append(task.number), real(worker, task)))
    preprocess([prepared / "c.jsonl"], prepared / "t", tmp_path / "d", split=(0.7, 0.2, 0.1))
    assert sorted(done) == sorted(set(done)), "a finished shard was done again"
    assert files(tmp_path / "d") == files(prepared / "d")


def test_much_text_is_read_by_compiled_code(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the shard on with which it is much; the files are the same."""
    pytest.importorskip("numba")
    monkeypatch.setattr(module, "_SHARD_BYTES", 5000)
    monkeypatch.setattr(shard_work, "_MUCH", 8000)
    real, encoders = shard_work.encoder_for, []

    def remembered(*arguments: Any, **options: Any) -> Any:
        encoders.append(real(*arguments, **options))
        return encoders[-1]

    monkeypatch.setattr(shard_work, "encoder_for", remembered)
    preprocess([prepared / "c.jsonl"], prepared / "t", tmp_path / "d", split=(0.7, 0.2, 0.1))
    assert [type(encoder).__name__ for encoder in encoders] == ["SegmentEncoder", "PathEncoder"]
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
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="empty.jsonl: empty, without a byte"):
        preprocess([tmp_path / "empty.jsonl"], prepared / "t", tmp_path / "d")


def test_changes_are_noticed(prepared: Path, tmp_path: Path) -> None:
    preprocess([prepared / "c.jsonl"], prepared / "t", tmp_path / "d")
    other = train_tokenizer([write_corpus(tmp_path / "c.jsonl", seed=1)], tmp_path / "other", 320)
    with pytest.raises(DataError, match="was made with another tokenizer"):
        check_dataset(tmp_path / "d" / "train", other)
    tokens = tmp_path / "d" / "train.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train\.bin: \d+ bytes instead of"):
        check_dataset(tmp_path / "d" / "train", Tokenizer(prepared / "t"))
    (tmp_path / "d" / "manifest.json").unlink()  # as older versions wrote data
    with pytest.raises(DataError, match="it changed after it was made"):
        check_dataset(tmp_path / "d" / "train", Tokenizer(prepared / "t"))
    with pytest.raises(DataError, match=r"nothing\.bin is missing \(there is: test, train, validation\)"):
        check_dataset(tmp_path / "d" / "nothing", other)


def test_large_vocabularies_take_four_bytes() -> None:
    assert token_dtype(2**16) == np.uint16
    assert token_dtype(2**16 + 1) == np.int32


def test_an_interruption_before_the_last_step_loses_nothing(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHARD_BYTES", 5000)

    def breaks_off(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    arguments = ([prepared / "c.jsonl"], prepared / "t", tmp_path / "d")
    for place in ("publish_directory", "write_manifest", "join_split"):
        with monkeypatch.context() as patch:
            patch.setattr(module, place, breaks_off)
            with pytest.raises(KeyboardInterrupt):
                preprocess(*arguments, split=(0.7, 0.2, 0.1))
        monkeypatch.setattr(ShardWorker, "do", breaks_off)
    preprocess(*arguments, split=(0.7, 0.2, 0.1))
    assert files(tmp_path / "d") == files(prepared / "d")
    assert not (tmp_path / "d.partial").exists()


def test_killed_after_its_output_was_published_it_is_done(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(share: float = 0.7) -> dict[str, module.SplitSummary]:
        return preprocess([prepared / "c.jsonl"], prepared / "t", tmp_path / "d", split=(share, 0.2, 0.1))

    def is_killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "remove_unfinished", is_killed)
        with pytest.raises(KeyboardInterrupt):
            prepare()
    assert (tmp_path / "d.partial").is_dir()
    with pytest.raises(DataError, match="exists; choose another place"):
        prepare(share=0.6)  # something else
    counts = json.loads((tmp_path / "d" / "dataset.json").read_text())["splits"]
    assert {name: split.tokens for name, split in prepare().items()} == {n: c["tokens"] for n, c in counts.items()}
    assert files(tmp_path / "d") == files(prepared / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    with pytest.raises(DataError, match="exists; choose another place"):
        prepare()


@pytest.mark.parametrize("damage", ["cut", "zeroed", "gone", "unmarked"])
def test_a_damaged_part_is_made_anew(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """After a cut of power files may have lost their ends, or their contents."""
    monkeypatch.setattr(module, "_SHARD_BYTES", 5000)
    arguments = ([prepared / "c.jsonl"], prepared / "t", tmp_path / "d")
    work = tmp_path / "d.partial"
    real = module._join

    def damaged_before_joining(*arguments: object) -> object:
        for number, path in enumerate(sorted(path for path in work.glob("part-*") if path.stat().st_size)):
            if number % 7 == 3:
                content = path.read_bytes()
                path.write_bytes(content[:-1] if damage == "cut" else bytes(len(content)))
                if damage == "gone" or (damage == "unmarked" and path.suffix == ".done"):
                    path.unlink()
        return real(*arguments)

    monkeypatch.setattr(module, "_join", damaged_before_joining)
    with pytest.raises(DataError, match="changed after it was written|cannot be written"):
        preprocess(*arguments, split=(0.7, 0.2, 0.1))
    monkeypatch.setattr(module, "_join", real)
    preprocess(*arguments, split=(0.7, 0.2, 0.1))
    assert files(tmp_path / "d") == files(prepared / "d")


def test_a_damaged_plan_is_not_believed(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ([prepared / "c.jsonl"], prepared / "t", tmp_path / "d")
    (tmp_path / "d.partial").mkdir()
    (tmp_path / "d.partial" / OURS).touch()
    for plan in (b"", b"\0" * 300, b'{"sources": [', b"[]"):
        (tmp_path / "d.partial" / "plan.json").write_bytes(plan)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_run_shards", lambda *arguments: check_dataset(tmp_path, None))
            with pytest.raises(DataError):
                preprocess(*arguments)
        assert "starts anew" in capsys.readouterr().err
    preprocess(*arguments, split=(0.7, 0.2, 0.1))
    assert files(tmp_path / "d") == files(prepared / "d")


def test_what_somebody_keeps_at_the_unfinished_place_stays(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "d.partial").mkdir()
    (tmp_path / "d.partial" / "plan.json").write_text("mine")
    with pytest.raises(OSError, match=r"d\.partial is in the way"):
        preprocess([prepared / "c.jsonl"], prepared / "t", tmp_path / "d")
    assert (tmp_path / "d.partial" / "plan.json").read_text() == "mine"


@pytest.mark.parametrize("split", [(0, 0, 0), (1, -1, 1), (float("nan"), 1, 1), (float("inf"), 1, 1), (1, 1)])
def test_shares_that_are_none_are_refused(prepared: Path, tmp_path: Path, split: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="split = .*expected three shares"):
        preprocess([prepared / "c.jsonl"], prepared / "t", tmp_path / "d", split=split)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{}", "what tools/preprocess.py writes"),
        ('{"tokenizer": "x", "vocab_size": 330, "splits": []}', "what tools/preprocess.py writes"),
        ('{"tokenizer": "x", "vocab_size": 330, "splits": {"train": {"documents": 1}}}', "tools/preprocess.py writes"),
        ('{"tokenizer": "x", "vocab_size": "9", "splits": {"train": {"documents": 1, "tokens": 2}}}', "is no number"),
        ("[" * 100_000, "cannot be read"),
        ('{"dataset": "another tool\'s"', "cannot be read"),
    ],
)
def test_a_foreign_description_is_named(prepared: Path, tmp_path: Path, content: str, expected: str) -> None:
    shutil.copytree(prepared / "d", tmp_path / "d")
    (tmp_path / "d" / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=rf"dataset\.json: .*{expected}"):
        check_dataset(tmp_path / "d" / "train", Tokenizer(prepared / "t"))


def test_a_damaged_index_is_named_without_a_manifest_too(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "d", tmp_path / "d")
    (tmp_path / "d" / "manifest.json").unlink()
    index = tmp_path / "d" / "train.idx"
    whole = index.read_bytes()
    for content in (b"", whole[:20], whole[:-8], bytes(len(whole)), b"x" + whole[1:]):
        index.write_bytes(content)
        with pytest.raises(DataError, match=r"train\.idx: not the index of"):
            check_dataset(tmp_path / "d" / "train", Tokenizer(prepared / "t"))


def test_data_without_a_description_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.json: No such file or directory; prepare it with"):
        dataset_fingerprint(tmp_path / "train")


def test_checksums_find_what_sizes_do_not(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "d", tmp_path / "d")
    assert check_manifest(tmp_path / "d", DataError, checksums=True)
    tokens = tmp_path / "d" / "train.bin"
    tokens.write_bytes(bytes(tokens.stat().st_size))
    check_dataset(tmp_path / "d" / "train", Tokenizer(prepared / "t"))
    with pytest.raises(DataError, match=r"train\.bin: the right size, but other content"):
        check_manifest(tmp_path / "d", DataError, checksums=True)
