"""Parquet, Arrow and Zstandard files, and one line where their libraries are missing."""

import json
import sys
from pathlib import Path

import pytest

from megatron_ext.data.prepare import documents
from megatron_ext.data.prepare.corpus import corpus_files, split_into_shards
from megatron_ext.data.prepare.documents import read_documents, read_shard
from megatron_ext.data.prepare.faults import Faults
from megatron_ext.errors import DataError

ROWS = [f"text {n}\n日本語" for n in range(20)]
LINES = "".join(json.dumps({"text": row}) + "\n" for row in ROWS).encode()


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.zst"])
def test_a_missing_library_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    library = "zstandard" if name.endswith("zst") else "pyarrow"
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DataError, match=rf"{name}: reading it needs a library: pip install {library}"):
        list(read_documents(corpus_files([tmp_path])))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    kinds = (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))
    for number, kind in enumerate(kinds):
        table = pyarrow.table({"id": list(range(20)), "text": pyarrow.array(ROWS, pyarrow.string()).cast(kind)})
        parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=7)
    files = corpus_files([tmp_path])
    assert list(read_documents(files)) == ROWS * 3
    shards = split_into_shards(files[:1], 1 << 20)
    assert [shard.group for shard in shards] == [0, 1, 2]
    assert shards[-1].stop == files[0].stat().st_size
    places = [place for shard in shards for place, _ in read_shard(shard)]
    assert places == sorted(set(places))
    with pytest.raises(DataError, match=r"0\.parquet: no text under 'body'; its columns: id, text"):
        list(read_documents(files, "body"))
    with pytest.raises(DataError, match=r"0\.parquet: no text under 'id': the column is of type int64"):
        list(read_documents(files, "id"))
    parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "null.parquet")
    with pytest.raises(DataError, match=r"null\.parquet: row group 0, row 1: no text under 'text': it is null"):
        list(read_documents([tmp_path / "null.parquet"]))
    (tmp_path / "bad.parquet").write_bytes(files[0].read_bytes()[:-20])
    with pytest.raises(DataError, match=r"bad\.parquet: "):
        list(read_documents([tmp_path / "bad.parquet"]))


def test_what_the_datasets_library_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its folders hold Arrow streams, descriptions, and caches of what was derived from them."""
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": ROWS})
    for name, opened in (
        ("data-00000-of-00002.arrow", pyarrow.ipc.new_stream),
        ("data-00001-of-00002.arrow", pyarrow.ipc.new_file),
        ("cache-0123.arrow", pyarrow.ipc.new_stream),
    ):
        with opened(str(tmp_path / name), table.schema) as file:
            file.write_table(table, max_chunksize=6)
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    assert list(read_documents(corpus_files([tmp_path]))) == ROWS * 2
    assert (
        "2 files are read, 3 left out: 1 cache of the datasets library (cache-0123.arrow), 2 description of data"
        in (capsys.readouterr().err)
    )
    (tmp_path / "bad.arrow").write_bytes(b"no arrow at all")
    with pytest.raises(DataError, match=r"bad\.arrow: .*fetch it again"):
        list(read_documents([tmp_path / "bad.arrow"]))


def test_zstandard(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    frames = zstandard.compress(LINES[:100]) + zstandard.compress(LINES[100:])
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    assert list(read_documents(corpus_files([tmp_path]))) == ROWS
    for content in (frames[:-3], frames[:30], frames + b"xx"):
        (tmp_path / "b.jsonl.zst").write_bytes(content)
        with pytest.raises(DataError, match=r"b\.jsonl\.zst: not Zstandard, damaged or cut"):
            list(read_documents([tmp_path / "b.jsonl.zst"]))


def test_a_line_that_is_too_long_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 100)
    monkeypatch.setattr(documents, "_BLOCK", 16)
    lines = ['{"text": "a"}', '{"text": "' + "b" * 500 + '"}', '{"text": "c"}', "", '{"text": "d"}']
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    for size in (1 << 20, 7, 60, 300):
        faults = Faults(are_fatal=False)
        shards = split_into_shards([tmp_path / "c.jsonl"], size)
        assert [text for shard in shards for _, text in read_shard(shard, faults=faults)] == ["a", "c", "d"]
        assert faults.count == 1
        assert faults.messages[0].startswith(f"{tmp_path}/c.jsonl:2: a document longer than")
