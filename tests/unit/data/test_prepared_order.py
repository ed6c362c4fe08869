"""What is prepared: in which order, from which documents, and what the description says of those left out."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

import megatron_ext.data.prepare.preprocess as module
from megatron_ext.data.prepare import filters, join, parts
from megatron_ext.data.prepare.filters import Dropped, Repetition
from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.data.prepare.shard_work import ShardWorker, TextOptions, splits_of
from megatron_ext.data.tokenizer import Tokenizer, train_tokenizer
from megatron_ext.errors import DataError
from tests.support.workspace import write_corpus

ALL = (1.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("order")
    train_tokenizer([write_corpus(directory / "c.jsonl")], directory / "t", 330)
    return directory


@pytest.fixture(scope="module")
def texts(place: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (place / "c.jsonl").read_text().splitlines()]


def read(place: Path, output: Path, split: str = "train") -> list[str]:
    tokenizer = Tokenizer(place / "t")
    return [tokenizer.decode(tokens[:-1].tolist()) for tokens in IndexedDataset(str(output / split))]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def described(output: Path) -> dict:
    return json.loads((output / "dataset.json").read_text())


def test_the_order_is_random_and_follows_from_the_text_alone(
    place: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither shards nor runs nor buckets change it."""
    preprocess([place / "c.jsonl"], place / "t", tmp_path / "a", split=ALL)
    monkeypatch.setattr(module, "_SHARD_BYTES", 3000)
    monkeypatch.setattr(module, "_BUCKET_BYTES", 9000)
    monkeypatch.setattr(parts, "_RUN_BYTES", 500)
    monkeypatch.setattr(parts, "_GATHERED", 100)
    preprocess([place / "c.jsonl"], place / "t", tmp_path / "b", split=ALL)
    assert (tmp_path / "a" / "train.bin").read_bytes() == (tmp_path / "b" / "train.bin").read_bytes()
    found = read(place, tmp_path / "a")
    assert sorted(found) == sorted(texts)
    number = {text: n for n, text in enumerate(texts)}
    steps = [abs(number[a] - number[b]) for a, b in zip(found, found[1:], strict=False)]
    assert np.mean(steps) == pytest.approx(len(texts) / 3, rel=0.15), "the mean distance in a random order"
    assert described(tmp_path / "a")["order"] == "random"


def test_the_order_of_the_text_is_kept_on_request(
    place: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHARD_BYTES", 3000)
    monkeypatch.setattr(parts, "_RUN_BYTES", 500)
    preprocess([place / "c.jsonl"], place / "t", tmp_path / "d", options=TextOptions(split=ALL, order="file"))
    assert read(place, tmp_path / "d") == texts
    assert described(tmp_path / "d")["order"] == "file"


@pytest.mark.parametrize("order", ["random", "file"])
def test_copies_are_left_out(
    place: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    monkeypatch.setattr(join, "_COMPARED", 40)
    monkeypatch.setattr(module, "_SHARD_BYTES", 3000)
    write(tmp_path / "a.jsonl", texts[:20])
    write(tmp_path / "b.jsonl", texts[10:60] + texts[:5])
    options = TextOptions(split=(0.8, 0.1, 0.1), order=order, deduplicate=True)  # type: ignore[arg-type]
    preprocess([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], place / "t", tmp_path / "d", options=options)
    said = described(tmp_path / "d")
    found = [text for split in said["splits"] for text in read(place, tmp_path / "d", split)]
    assert Counter(found) == Counter(texts[:60])
    assert said["left_out"]["copy of another document"] == 15
    assert [file["documents"] for file in said["files"]] == [20, 40], "the first of two copies stays"
    counts = {name: sum(split[name] for split in said["splits"].values()) for name in ("documents", "tokens", "bytes")}
    assert counts == {name: sum(file[name] for file in said["files"]) for name in counts}
    assert counts["bytes"] == sum(len(text.encode()) for text in texts[:60])


def test_a_file_that_is_given_twice_is_two(place: Path, texts: list[str], tmp_path: Path) -> None:
    source = write(tmp_path / "c.jsonl", texts[:9])
    preprocess([source, source], place / "t", tmp_path / "d", split=ALL)
    assert [file["documents"] for file in described(tmp_path / "d")["files"]] == [9, 9]


def test_copies_that_stay_are_no_neighbours(place: Path, texts: list[str], tmp_path: Path) -> None:
    write(tmp_path / "c.jsonl", texts[:40] * 5)
    preprocess([tmp_path / "c.jsonl"], place / "t", tmp_path / "d", split=ALL)
    found = read(place, tmp_path / "d")
    assert sum(a == b for a, b in zip(found, found[1:], strict=False)) < 20


def test_a_document_keeps_its_split_when_files_are_added(place: Path, texts: list[str], tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", texts[:80])
    preprocess([tmp_path / "b.jsonl"], place / "t", tmp_path / "one", split=(0.6, 0.2, 0.2))
    write(tmp_path / "a.jsonl", texts[80:])
    preprocess([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], place / "t", tmp_path / "two", split=(0.6, 0.2, 0.2))
    for split in ("train", "validation", "test"):
        assert set(read(place, tmp_path / "one", split)) <= set(read(place, tmp_path / "two", split))
    # As versions before drew them: prepared data and what is added to it agree.
    draws = np.array([0, 2**63, 2**64 - 1, int(0.6 * 2**64) - 2**12], dtype=np.uint64)
    assert splits_of(draws, (0.6, 0.2, 0.2)).tolist() == [0, 0, 2, 0]
    assert splits_of(draws, (0.5, 0.5, 0.0)).tolist() == [0, 1, 1, 1]


def test_lines_that_cannot_be_read_are_counted_and_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ['{"text": "kept one"}', "broken", '{"text": 5}', '{"text": ""}', '{"text": "kept two"}', '{"txt": "x"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.json").write_text('[{"text": "kept three"}, {"text": null}, {"text": "kept four"}, oh')
    inputs, skip = [tmp_path / "a.jsonl", tmp_path / "b.json"], TextOptions(split=ALL, bad_lines="skip")
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON .*; --bad-lines skip leaves"):
        preprocess(inputs, place / "t", tmp_path / "d", options=TextOptions(split=ALL))
    preprocess(inputs, place / "t", tmp_path / "d", options=skip)
    assert sorted(read(place, tmp_path / "d")) == ["kept four", "kept one", "kept three", "kept two"]
    said = described(tmp_path / "d")
    assert said["left_out"] == {"empty": 1, "bad line": 5}
    assert [line.split("/")[-1].split(" ")[0] for line in said["first_bad_lines"]] == [
        *("a.jsonl:2:", "a.jsonl:3:", "a.jsonl:6:", "b.json:1:", "b.json:1:")
    ]
    assert "6 left out: 1 empty, 5 bad line" in (told := capsys.readouterr().err)
    assert "starts anew" not in told, "what is done when a bad line ends it has none"
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "x"}\n' * 50)
    (tmp_path / "c.jsonl.gz").write_bytes((tmp_path / "c.jsonl.gz").read_bytes()[:-9])
    with pytest.raises(DataError, match="not gzip, damaged or cut"):
        preprocess([tmp_path / "c.jsonl.gz"], place / "t", tmp_path / "e", options=skip)


class Masks:
    """A filter as users write them: it changes texts, and drops some with a reason and some without."""

    def __call__(self, text: str) -> str | Dropped | None:
        if "secret" in text:
            return Dropped("a secret")
        return None if "no" in text else text.replace("090", "XXX")


class Fails:
    def __call__(self, text: str) -> str:
        raise ValueError("why")


class Halves:
    def __call__(self, text: str) -> str:
        return "\ud83d"


def test_filters_work_in_the_workers_and_what_they_drop_is_counted(place: Path, tmp_path: Path) -> None:
    kept = ["call 090 or not at all"[:11], "fine text here"]
    write(tmp_path / "c.jsonl", [*kept, "a secret", "no", "ab", "x" * 500, "abcdefgh " * 40])
    options = TextOptions(
        split=ALL, filters=(f"{__name__}:Masks",), min_characters=3, max_characters=400, max_repetition=0.5
    )
    preprocess([tmp_path / "c.jsonl"], place / "t", tmp_path / "d", options=options, workers=2)
    assert sorted(read(place, tmp_path / "d")) == ["call XXX or", "fine text here"]
    said = described(tmp_path / "d")
    dropped = {"a secret": 1, f"{__name__}:Masks": 0, "too short": 2, "too long": 1, "repetition": 1}
    assert said["left_out"] == {"empty": 0, "bad line": 0} | {name: n for name, n in dropped.items() if n}
    samples = [json.loads(line) for line in (tmp_path / "d" / "dropped.jsonl").read_text().splitlines()]
    assert {sample["reason"] for sample in samples} == {"a secret", "too short", "too long", "repetition"}
    assert len(said["filters"][0]["code"]) == 16, "a change of the filter is noticed"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nowhere:Filter", "no module 'nowhere'; give module:Class"),
        (f"{__name__}:Nothing", "has no attribute 'Nothing'"),
        (__name__, "expected module:Class"),
        ("collections:Counter", "cannot be called with a text"),
        (f"{__name__}:Fails", "failed on 'some text': ValueError: why"),
        (f"{__name__}:Halves", "returned half a character"),
    ],
)
def test_filters_that_are_none_are_named(place: Path, tmp_path: Path, name: str, expected: str) -> None:
    write(tmp_path / "c.jsonl", ["some text"])
    with pytest.raises(DataError, match="filters: ") as error:
        preprocess([tmp_path / "c.jsonl"], place / "t", tmp_path / "d", options=TextOptions(filters=(name,)))
    assert expected in str(error.value)


def test_lengths_that_no_document_has_are_refused_at_once(place: Path, tmp_path: Path) -> None:
    write(tmp_path / "c.jsonl", ["some text"])
    options = TextOptions(min_characters=10, max_characters=5)
    with pytest.raises(DataError, match="min_characters = 10, max_characters = 5: no document is as long"):
        preprocess([tmp_path / "c.jsonl"], place / "t", tmp_path / "d", options=options)
    assert not list(tmp_path.glob("d*"))


def test_repetition_by_hand() -> None:
    assert Repetition(0.5).share("short") == 0
    assert Repetition(0.5).share("a" * 116) == pytest.approx(100 / 101)
    assert Repetition(0.5).share("".join(map(chr, range(100, 400)))) == 0
    assert Repetition(0.5).share("".join(map(chr, range(100, 200))) * 2) == pytest.approx(85 / 185)
    assert filters.chain_of([], 2, 3, None)("abcd") == Dropped("too long")


def test_another_option_starts_anew(place: Path, texts: list[str], tmp_path: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "c.jsonl", texts[:20])
    with monkeypatch.context() as patch:
        patch.setattr(module, "join_split", lambda *a, **b: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            preprocess([tmp_path / "c.jsonl"], place / "t", tmp_path / "d")
    preprocess([tmp_path / "c.jsonl"], place / "t", tmp_path / "d", options=TextOptions(min_characters=2))
    assert "begun with another tokenizer or other options; starts anew" in capsys.readouterr().err


def test_only_what_is_made_of_a_file_that_changed_is_made_anew(
    place: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compressed file is one shard, a plain one several; a file may be added."""
    monkeypatch.setattr(module, "_SHARD_BYTES", 3000)
    monkeypatch.setattr(module, "_MOST_HERE", float("inf"))
    inputs, real, done = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl")], ShardWorker.do, []

    def write_compressed(chosen: list[str]) -> None:
        write(tmp_path / "b.jsonl", chosen)
        inputs[1].write_bytes(gzip.compress((tmp_path / "b.jsonl").read_bytes()))

    monkeypatch.setattr(ShardWorker, "do", lambda worker, task: (done.append(task.file), real(worker, task)))
    write(inputs[0], texts[:60])
    write_compressed(texts[60:80])
    write(inputs[2], texts[80:])
    with monkeypatch.context() as patch:
        patch.setattr(module, "join_split", lambda *a, **b: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            preprocess(inputs[:2], place / "t", tmp_path / "d")
    assert len(done) > 3
    done.clear()
    write_compressed(texts[60:70])
    preprocess(inputs, place / "t", tmp_path / "d")
    assert done == [1, *[2] * (len(done) - 1)]
    preprocess(inputs, place / "t", tmp_path / "new")
    for name in ("train.bin", "validation.bin"):
        assert (tmp_path / "d" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


def test_a_file_that_changes_while_it_is_read_is_named_and_made_anew(
    place: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a corpus that is still being written, half a line would be read, or none of what comes later."""
    monkeypatch.setattr(module, "_MOST_HERE", float("inf"))
    inputs, real = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], ShardWorker.do
    write(inputs[0], texts[:40])
    write(inputs[1], texts[40:60])
    with monkeypatch.context() as patch:
        patch.setattr(ShardWorker, "do", lambda worker, task: (real(worker, task), write(inputs[1], texts[40:])))
        with pytest.raises(DataError, match=r"b\.jsonl: changed while it was read; start the same command again"):
            preprocess(inputs, place / "t", tmp_path / "d")
    assert not (tmp_path / "d").exists()
    done: list[int] = []
    monkeypatch.setattr(ShardWorker, "do", lambda worker, task: (done.append(task.file), real(worker, task)))
    summary = preprocess(inputs, place / "t", tmp_path / "d")
    assert done == [1]
    assert sum(split.documents for split in summary.values()) == len(texts)


@given(st.lists(st.integers(1, 40), max_size=12), st.randoms(use_true_random=False))
def test_documents_are_gathered_in_blocks_of_bounded_size(lengths: list[int], draws: random.Random) -> None:
    order = draws.sample(range(len(lengths)), len(lengths))
    stops = np.cumsum(lengths, dtype=np.int64)
    ids, starts = np.arange(stops[-1] if lengths else 0, dtype=np.uint16), stops - np.array(lengths, dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "_GATHERED", 8)
        blocks = list(parts.gathered(ids, starts[order], np.array(lengths, dtype=np.int64)[order]))
    wanted = [number for one in order for number in range(starts[one], stops[one])]
    assert [int(number) for block in blocks for number in block] == wanted
    assert all(0 < len(block) <= 8 for block in blocks)
