"""Reads corpora: JSON Lines, JSON, plain text, these compressed, and folders of them, in pieces for many processes."""

import gzip
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from megatron_ext.checkpoint.tokenizer_files import FAST_FILE, MODEL_FILE, SETTINGS_FILE
from megatron_ext.data.prepare.json_stream import NotJson, json_values, too_long, why_not_json
from megatron_ext.errors import DataError
from megatron_ext.files import UNFINISHED

_ENDINGS = (".jsonl", ".json", ".txt")
READABLE = ".jsonl (an object a line), .json (an array of objects, or objects) and .txt (a document), also as .gz"
LONGEST_DOCUMENT = 1 << 28
"""Bytes of the longest document: tokenizing takes 25 to 200 times its size in memory."""
_TOKENIZER = {FAST_FILE, MODEL_FILE, SETTINGS_FILE}
_DESCRIPTIONS = {"dataset.json", "manifest.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
_BLOCK = 1 << 20
_BOM, _UTF16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Shard:
    """A byte range of a JSONL file (the lines that begin in it), or a whole file of another kind."""

    path: Path
    start: int
    stop: int


def corpus_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files of a corpus: those named, and every readable one below the folders named, sorted, links followed.

    What a folder holds and is not read is said in one line on stderr.

    Raises:
        DataError: nothing there, or a file of another kind.
    """
    files: list[Path] = []
    for entry in map(Path, inputs):
        if entry.is_dir():
            files.extend(_files_below(entry))
        elif entry.is_file():
            if _ending(entry) is None:
                raise DataError(f"{entry}: expected {READABLE}")
            files.append(entry)
        elif entry.exists():
            raise DataError(f"{entry}: neither a file nor a folder")
        else:
            raise DataError(f"{entry}: no such file or folder")
    return files


def _files_below(folder: Path) -> list[Path]:
    found: list[Path] = []
    left_out: dict[str, list[Path]] = {}
    seen: set[str] = set()
    for directory, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        # Links may lead in circles, or twice to the same text.
        if _again(directory, seen):
            left_out.setdefault("already read by another name", []).append(Path(directory))
            folders.clear()
            continue
        folders.sort(key=lambda name: (os.path.islink(os.path.join(directory, name)), name))
        for name in [name for name in folders if name.endswith(UNFINISHED)]:
            folders.remove(name)
            left_out.setdefault("unfinished output", []).append(Path(directory, name))
        is_tokenizer = not _TOKENIZER.isdisjoint(names)
        for path in (Path(directory, name) for name in sorted(names)):
            if (why := _why_not_read(path, is_tokenizer, seen)) is None:
                found.append(path)
            else:
                left_out.setdefault(why, []).append(path)
    counts = [_count(why, paths, folder) for why, paths in sorted(left_out.items())]
    if not found:
        raise DataError(f"{folder}: nothing to read below ({', '.join(counts) or 'no files'}); expected {READABLE}")
    if counts:
        total = sum(map(len, left_out.values()))
        read = "1 file is read" if len(found) == 1 else f"{len(found)} files are read"
        print(f"{folder}: {read}, {total} left out: {', '.join(counts)}", file=sys.stderr)
    return sorted(found)


def _why_not_read(path: Path, is_tokenizer: bool, seen: set[str]) -> str | None:
    """Why the file `path` of a folder is no text of a corpus, or None."""
    if not path.exists():
        return "broken link"
    if not path.is_file():
        return "no regular file"
    if _ending(path) is None:
        return "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]) or "without ending"
    # Data, tokenizers and corpora often stand in one folder.
    if path.name in _DESCRIPTIONS:
        return "description of data"
    if is_tokenizer and _ending(path) != ".jsonl":
        return "of a tokenizer"
    return "already read by another name" if _again(path, seen) else None


def _again(path: str | Path, seen: set[str]) -> bool:
    real = os.path.realpath(path)
    if real in seen:
        return True
    seen.add(real)
    return False


def _count(why: str, paths: list[Path], folder: Path) -> str:
    return f"{len(paths)} {why} ({'such as ' if len(paths) > 1 else ''}{paths[0].relative_to(folder)})"


def _raise(error: OSError) -> None:
    raise error


def _ending(path: Path) -> str | None:
    """What kind of corpus file `path` is by its name, or None."""
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    return ending if ending in _ENDINGS else None


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def split_into_shards(files: Sequence[Path], shard_bytes: int) -> list[Shard]:
    """Cut `files` into shards of about `shard_bytes`, in order. Only plain JSONL can be entered in the middle."""
    shards: list[Shard] = []
    for path in files:
        size = path.stat().st_size
        can_be_cut = _ending(path) == ".jsonl" and not _is_compressed(path)
        step = shard_bytes if can_be_cut else max(size, 1)
        shards.extend(Shard(path, start, min(start + step, size)) for start in range(0, size, step))
    return shards


def read_documents(files: Sequence[Path], text_key: str = "text") -> Iterator[str]:
    """Yield every document of `files` in order."""
    for shard in split_into_shards(files, shard_bytes=1 << 62):
        yield from read_shard(shard, text_key)


def read_shard(shard: Shard, text_key: str = "text") -> Iterator[str]:
    """Yield the documents of a shard. No more than the longest document is held in memory.

    Raises:
        DataError: the file is damaged, not UTF-8, or has no string under `text_key`; names file and line.
    """
    ending = _ending(shard.path)
    with _opened(shard.path) as file:
        if ending == ".txt":
            yield _decode(file.read(LONGEST_DOCUMENT + 1), lambda: f"{shard.path}:1")
        elif ending == ".json":
            yield from _documents_of_json(file, shard.path, text_key)
        else:
            yield from _documents_of_lines(file, shard, text_key)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed; inside, a fault of reading names the file."""
    try:
        with open(path, "rb") as plain:
            yield gzip.GzipFile(fileobj=plain) if _is_compressed(path) else plain  # type: ignore[misc]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not gzip, damaged or cut ({error}); fetch or compress it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _documents_of_lines(file: IO[bytes], shard: Shard, text_key: str) -> Iterator[str]:
    path, stop = shard.path, sys.maxsize if _is_compressed(shard.path) else shard.stop
    if shard.start > 0:
        file.seek(shard.start - 1)
        # The line that begins before this shard belongs to the one before; it may end behind this one.
        while not file.readline(_BLOCK).endswith(b"\n"):
            if file.tell() >= stop:
                return
    while (offset := file.tell()) < stop and (line := file.readline(LONGEST_DOCUMENT + 1)):
        if line.strip():
            where = partial(_line_at, path, offset)
            yield _text_of(_parse(_decode(line, where), where), text_key, where)


def _documents_of_json(file: IO[bytes], path: Path, text_key: str) -> Iterator[str]:
    try:
        for line, value in json_values(file, LONGEST_DOCUMENT):
            yield _text_of(value, text_key, partial("{}:{}".format, path, line))
    except NotJson as error:
        raise DataError(f"{path}:{error.line}: {error.why}") from error


def _parse(line: str, where: Callable[[], str]) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where()}: {why_not_json(error)}") from error


_JSON_NAMES = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "an array"}


def _text_of(row: Any, text_key: str, where: Callable[[], str]) -> str:
    if not isinstance(row, dict):
        found = _JSON_NAMES.get(type(row), "a string")
        raise DataError(f"{where()}: no text under {text_key!r}: expected an object, found {found}")
    if text_key not in row:
        keys = ", ".join(list(row)[:10]) + (", ..." if len(row) > 10 else "")
        way_out = "name the key of the text (--text-key) or leave the file out"
        raise DataError(f"{where()}: no text under {text_key!r}; the line has: {keys or 'nothing'}; {way_out}")
    text = row[text_key]
    if not isinstance(text, str):
        found = _JSON_NAMES.get(type(text), "an object")
        raise DataError(f"{where()}: no text under {text_key!r}: it is {found}, not a string; leave such documents out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where()}: half a character, which UTF-8 has not ({error})") from error
    return text


def _decode(data: bytes, where: Callable[[], str]) -> str:
    """Text of UTF-8, without a byte order mark."""
    if len(data) > LONGEST_DOCUMENT:
        raise DataError(f"{where()}: {too_long(LONGEST_DOCUMENT)}")
    try:
        return data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        guess = ", by its first bytes UTF-16" if data.startswith(_UTF16) else ""
        raise DataError(f"{where()}: not UTF-8 (byte {error.start}{guess}); convert it with iconv") from error


def _line_at(path: Path, offset: int) -> str:
    """File and number of the line that begins `offset` bytes into the (decompressed) file."""
    number = 1
    with _opened(path) as file:
        while offset > 0 and (block := file.read(min(_BLOCK, offset))):
            number += block.count(b"\n")
            offset -= len(block)
    return f"{path}:{number}"
