"""Reading corpora in shards: every document once, and faults named with file and line."""

import gzip
import io
import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data.prepare import documents, json_stream
from megatron_ext.data.prepare.corpus import corpus_files, split_into_shards
from megatron_ext.data.prepare.documents import read_documents, read_shard
from megatron_ext.data.prepare.json_stream import NotJson, json_values
from megatron_ext.data.python_corpus import write_python_corpus
from megatron_ext.errors import DataError


@settings(max_examples=40)
@given(texts=st.lists(st.text(max_size=30), max_size=20), size=st.integers(1, 80))
def test_shards_of_any_size_hold_every_document_once(
    texts: list[str], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8")
    read = [text for shard in split_into_shards([path], size) for _, text in read_shard(shard)]
    assert read == texts


def test_folders_and_text_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_text("first line\nsecond line")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n{"text": "y"}')
    (tmp_path / "ignored.md").write_text("no")
    assert list(read_documents(corpus_files([tmp_path]))) == ["x", "y", "first line\nsecond line"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "a"}\nnot json\n', "c.jsonl:2: not JSON"),
        ('{"text": "a"}\n{"txt": "b"}\n', r"c.jsonl:2: no text under 'text'; the line has: txt"),
        ('{"text": 5}\n', "c.jsonl:1: no text under 'text': it is a number"),
        ('{"text": null}\n', "c.jsonl:1: no text under 'text': it is null"),
        ("[1]\n", "c.jsonl:1: no text under 'text': expected an object, found an array"),
        (
            '\n{"text": "a", "n": ' + "1" * 5000 + "}",
            "c.jsonl:2: not JSON that can be read .a number of more than 4300",
        ),
        ('{"text": ' + "[" * 100_000, "c.jsonl:1: not JSON that can be read .nested too deeply"),
        ('{"text": "a"}\n{"text": "\\ud800"}\n', "c.jsonl:2: half a character"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=expected):
        list(read_documents([path]))


def test_bad_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        corpus_files([tmp_path / "nowhere.jsonl"])
    with pytest.raises(DataError, match=r"nothing to read below \(no files\); expected \.jsonl"):
        corpus_files([tmp_path])
    (tmp_path / "x.csv").touch()
    with pytest.raises(DataError, match=r"expected \.jsonl"):
        corpus_files([tmp_path / "x.csv"])
    with pytest.raises(DataError, match=r"nothing to read below \(1 \.csv \(x\.csv\)\)"):
        corpus_files([tmp_path])
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        corpus_files([tmp_path / "pipe.jsonl"])


ROWS = '{"text": "x"}\n\n{"text": "y"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.JSONL", ROWS.encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + ROWS.replace("\n", "\r\n").encode()),
        ("a.jsonl.gz", gzip.compress(ROWS.encode(), mtime=0)),
        ("a.jsonl.gz", gzip.compress(ROWS[:20].encode(), mtime=0) + gzip.compress(ROWS[20:].encode(), mtime=0)),
        ("a.json", b'\xef\xbb\xbf [{"text": "x"},\n {"text": "y"}] '),
        ("a.json", ROWS.encode()),
        ("a.Json.GZ", gzip.compress(b'[{"text": "x"}, {"text": "y"}]', mtime=0)),
    ],
)
def test_every_kind_of_file_is_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(read_documents(corpus_files([tmp_path]))) == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl.gz", b"\x1f\x8b", "a.jsonl.gz: not gzip, damaged or cut"),
        ("a.jsonl.gz", gzip.compress(ROWS.encode() * 99, mtime=0)[:-20], "a.jsonl.gz: not gzip, damaged or cut"),
        ("a.txt.gz", b"plain", "a.txt.gz: not gzip, damaged or cut"),
        ("a.jsonl.gz", gzip.compress(b'\n\n{"text": 1}', mtime=0), "a.jsonl.gz:3: no text under 'text'"),
        ("a.txt", "a".encode("utf-16"), "a.txt:1: not UTF-8 .byte 0, by its first bytes UTF-16"),
        ("a.json", ROWS.encode("utf-16"), "a.json:1: not UTF-8, by its first bytes UTF-16"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl:2: not UTF-8"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"}', "a.json:2: not JSON .the array does not end"),
        ("a.json", b'[{"text": "a"}\n{"text": "b"}]', "a.json:2: not JSON .expected ',' or ']'"),
        ("a.json", b'[{"text": "a"}]\n]', "a.json:2: not JSON .text after the end"),
        ("a.json", b'[\n{"text": "a"}, {"text": ', "a.json:2: not JSON .Expecting value"),
        ("a.json", b'{"a": 1, "b": 2}', "no text under 'text'; the line has: a, b; name the key of the text"),
        ("a.json", b"[" * 100_000, "a.json:1: not JSON that can be read .nested too deeply"),
        ("a.json", b'[{"n": ' + b"1" * 5000, "a.json:1: not JSON that can be read .a number of more than 4300"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected):
        list(read_documents(corpus_files([tmp_path])))


def test_what_a_folder_leaves_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked.txt").write_text("linked")
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"text": "x"}')
    (folder / "deep" / "loop").symlink_to(folder)
    (folder / "ja").symlink_to(elsewhere)
    (folder / "again.txt").symlink_to(elsewhere / "linked.txt")
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    (folder / "notes").touch()
    for name in ("b.xml", "c.xml", "d.csv.gz"):
        (folder / name).touch()
    assert list(read_documents(corpus_files([folder]))) == ["x", "linked"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"{folder}: 2 files are read, 7 left out: 1 .csv.gz (d.csv.gz), 2 .xml (such as b.xml), "
        "2 already read by another name (such as deep/loop), 1 broken link (gone.txt), 1 without ending (notes)"
    )


def test_data_and_tokenizers_among_the_text_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("d/dataset.json", "d/manifest.json", "d.partial/plan.json", "t/tokenizer.json", "t/merges.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "d" / "train.bin").touch()
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    assert corpus_files([tmp_path]) == [tmp_path / "a.jsonl"]
    assert capsys.readouterr().err == (
        f"{tmp_path}: 1 file is read, 6 left out: 1 .bin (d/train.bin), "
        "2 description of data (such as d/dataset.json), 2 of a tokenizer (such as t/merges.txt), "
        "1 unfinished output (d.partial)\n"
    )


@settings(max_examples=60)
@given(
    values=st.lists(
        st.recursive(
            st.none() | st.integers() | st.text(max_size=4) | st.floats(allow_nan=False),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=6,
    ),
    block=st.integers(1, 9),
    indent=st.sampled_from([None, 1]),
)
def test_json_is_read_in_blocks_of_any_size(values: list[object], block: int, indent: int | None) -> None:
    text = json.dumps(values, ensure_ascii=False, indent=indent).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_BLOCK", block)
        assert [value for _, value in json_values(io.BytesIO(text), 1000)] == values
        for end in range(1, len(text)):
            with pytest.raises(NotJson):
                list(json_values(io.BytesIO(text[:end]), 1000))


def test_a_long_line_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 1 << 20)
    path = tmp_path / "c.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "a"}\n')
        file.truncate(1 << 27)
    tracemalloc.start()
    for shard in split_into_shards([path], 1 << 24)[1:]:
        assert list(read_shard(shard)) == []
    with pytest.raises(DataError, match=r"c\.jsonl:2: a document longer than 1 MiB; cut it into several"):
        list(read_documents([path]))
    assert documents._line_at(path, 1 << 26) == f"{path}:2"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20, "the line has 128 MiB"


def test_python_corpus_is_large_and_repeats(tmp_path: Path) -> None:
    documents, size = write_python_corpus(tmp_path / "one.jsonl")
    write_python_corpus(tmp_path / "two.jsonl")
    assert size >= 8_000_000
    first = (tmp_path / "one.jsonl").read_text()
    assert first == (tmp_path / "two.jsonl").read_text()
    texts = [json.loads(line)["text"] for line in first.splitlines()]
    assert len(texts) == len(set(texts)) == documents


def test_documentation_of_python_is_no_code(tmp_path: Path) -> None:
    documents, size = write_python_corpus(tmp_path / "documentation.jsonl", "documentation")
    rows = [json.loads(line) for line in (tmp_path / "documentation.jsonl").read_text().splitlines()]
    assert (len(rows), sum(len(row["text"].encode()) for row in rows)) == (documents, size)
    (argparse,) = (row["text"] for row in rows if row["source"] == "argparse.py: module")
    assert argparse.startswith("Command-line parsing library")
    assert "import os" not in argparse
