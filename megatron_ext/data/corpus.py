"""Reads corpora: JSON Lines, plain text and folders of them, in pieces that many processes can take."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.errors import DataError

_SUFFIXES = (".jsonl", ".txt")


@dataclass(frozen=True)
class Shard:
    """A byte range of a JSONL file (the lines that begin in it), or a whole text file (one document)."""

    path: Path
    start: int
    stop: int


def corpus_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files of a corpus: those named, and every .jsonl and .txt below the folders named, sorted.

    Raises:
        DataError: nothing there, or a file of another kind.
    """
    files: list[Path] = []
    for entry in map(Path, inputs):
        if entry.is_dir():
            found = sorted(p for p in entry.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
            if not found:
                raise DataError(f"{entry}: no .jsonl or .txt file below this folder")
            files.extend(found)
        elif not entry.is_file():
            raise DataError(f"{entry}: no such file or folder")
        elif entry.suffix not in _SUFFIXES:
            raise DataError(f"{entry}: expected .jsonl (one JSON object a line) or .txt (one document a file)")
        else:
            files.append(entry)
    return files


def split_into_shards(files: Sequence[Path], shard_bytes: int) -> list[Shard]:
    """Cut `files` into shards of about `shard_bytes`, in order."""
    shards = []
    for path in files:
        size = path.stat().st_size
        step = shard_bytes if path.suffix == ".jsonl" else max(size, 1)
        shards.extend(Shard(path, start, min(start + step, size)) for start in range(0, size, step))
    return shards


def read_shard(shard: Shard, text_key: str = "text") -> Iterator[str]:
    """Yield the documents of a shard.

    Raises:
        DataError: a line is not a JSON object with a string under `text_key`; names file and line.
    """
    if shard.path.suffix == ".txt":
        yield _decode(shard.path.read_bytes(), shard.path, 1)
        return
    with open(shard.path, "rb") as file:
        file.seek(max(shard.start - 1, 0))
        if shard.start > 0:
            file.readline()  # the line that begins before this shard belongs to the one before
        while (offset := file.tell()) < shard.stop and (line := file.readline()):
            if line.strip():
                yield _document(line, shard.path, offset, text_key)


def read_documents(files: Sequence[Path], text_key: str = "text") -> Iterator[str]:
    """Yield every document of `files` in order."""
    for shard in split_into_shards(files, shard_bytes=1 << 62):
        yield from read_shard(shard, text_key)


def _document(line: bytes, path: Path, offset: int, text_key: str) -> str:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}:{_line_number(path, offset)}: not JSON ({error})") from error
    text = row.get(text_key) if isinstance(row, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{path}:{_line_number(path, offset)}: no text under {text_key!r}; the line has: {keys}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path}:{_line_number(path, offset)}: half a character, which UTF-8 has not ({error})"
        ) from error
    return text


def _decode(data: bytes, path: Path, line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{line}: not UTF-8 (byte {error.start})") from error


def _line_number(path: Path, offset: int) -> int:
    with open(path, "rb") as file:
        return file.read(offset).count(b"\n") + 1
