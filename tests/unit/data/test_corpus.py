"""Reading corpora in shards: every document once, and faults named with file and line."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data.corpus import corpus_files, read_documents, read_shard, split_into_shards
from megatron_ext.data.python_corpus import write_python_corpus
from megatron_ext.errors import DataError


@settings(max_examples=40)
@given(texts=st.lists(st.text(max_size=30), max_size=20), size=st.integers(1, 80))
def test_shards_of_any_size_hold_every_document_once(
    texts: list[str], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl"
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8")
    read = [text for shard in split_into_shards([path], size) for text in read_shard(shard)]
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
        ('{"text": 5}\n', "c.jsonl:1: no text under"),
        ("[1]\n", "c.jsonl:1: no text under"),
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
    with pytest.raises(DataError, match=r"no \.jsonl or \.txt file below"):
        corpus_files([tmp_path])
    (tmp_path / "x.parquet").touch()
    with pytest.raises(DataError, match=r"expected \.jsonl"):
        corpus_files([tmp_path / "x.parquet"])


def test_python_corpus_is_large_and_repeats(tmp_path: Path) -> None:
    documents, size = write_python_corpus(tmp_path / "one.jsonl")
    write_python_corpus(tmp_path / "two.jsonl")
    assert size >= 8_000_000
    first = (tmp_path / "one.jsonl").read_text()
    assert first == (tmp_path / "two.jsonl").read_text()
    texts = [json.loads(line)["text"] for line in first.splitlines()]
    assert len(texts) == len(set(texts)) == documents
