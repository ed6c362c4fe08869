"""Reads the documents of a shard: JSON Lines, JSON, plain text, these compressed, and tables."""

import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from megatron_ext.data.prepare.columns import rows_of_arrow, rows_of_parquet
from megatron_ext.data.prepare.corpus import Shard, ending_of, is_compressed, split_into_shards
from megatron_ext.data.prepare.faults import BadDocument, Faults
from megatron_ext.data.prepare.json_stream import NotJson, json_values, too_long, why_not_json
from megatron_ext.data.prepare.zstandard_file import ZstandardFile
from megatron_ext.errors import DataError

LONGEST_DOCUMENT = 1 << 24
"""Bytes of the longest document: reading it takes up to nine times its size in memory (characters of four bytes)."""
_BLOCK = 1 << 20
_BOM, _UTF16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
_GROUP_SHIFT = 28


def read_documents(files: Sequence[Path], text_key: str = "text", faults: Faults | None = None) -> Iterator[str]:
    """Yield every document of `files` in order; see `read_shard`."""
    for shard in split_into_shards(files, shard_bytes=1 << 62):
        for _, text in read_shard(shard, text_key, faults):
            yield text


T = TypeVar("T")
_Take = Callable[[Any], T]
"""What is taken of the value of a line, or of the row of a table; raises BadDocument."""


def read_shard(shard: Shard, text_key: str = "text", faults: Faults | None = None) -> Iterator[tuple[int, str]]:
    """Yield (place in its file, text) of the documents of a shard. One document is held in memory at a time.

    A place is a number below 2^44 that grows within the file, whatever its shards are.

    Args:
        faults: what to do about documents that cannot be read; without it they are fatal.

    Raises:
        DataError: the file is damaged, not UTF-8, or has no string under `text_key`; names file and line.
    """
    faults = Faults() if faults is None else faults
    yield from _read(shard, text_key, partial(_text_of, text_key=text_key), lambda text: text, faults)


def read_rows(shard: Shard, faults: Faults | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (place in its file, object) as `read_shard` does: whole objects, or rows of tables by column.

    A file of plain text is an object with a `text`.
    """
    faults = Faults() if faults is None else faults
    yield from _read(shard, None, _object_of, lambda text: {"text": text}, faults)


def where_in(path: Path, place: int) -> str:
    """File and line, or row, of the document that was read at `place`; reads the lines before it."""
    if ending_of(path) == ".jsonl":
        return _line_at(path, place)
    group, row = divmod(place, 1 << _GROUP_SHIFT)
    return f"{path}: row group {group}, row {row}" if ending_of(path) == ".parquet" else f"{path}: entry {row}"


def _read(
    shard: Shard, column: str | None, take: _Take[T], of_text: Callable[[str], T], faults: Faults
) -> Iterator[tuple[int, T]]:
    """What `take` makes of each value of a shard; of tables only `column` is read, if that is given."""
    ending = ending_of(shard.path)
    if ending == ".parquet":
        yield from _documents_of_rows(rows_of_parquet(shard.path, shard.group, column), shard, take, faults)
        return
    if ending == ".arrow":
        yield from _documents_of_rows(rows_of_arrow(shard.path, column), shard, take, faults)
        return
    with _opened(shard.path) as file:
        if ending == ".txt":
            yield from ((place, of_text(text)) for place, text in _whole(file, shard.path, faults))
        elif ending == ".json":
            yield from _documents_of_json(file, shard.path, take, faults)
        else:
            yield from _documents_of_lines(file, shard, take, faults)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed; inside, a fault of reading names the file."""
    kind = path.suffix.lower()[1:]
    try:
        with open(path, "rb") as plain:
            if kind == "gz":
                yield gzip.GzipFile(fileobj=plain)  # type: ignore[misc]
            elif kind == "zst":
                yield io.BufferedReader(ZstandardFile(plain, path), _BLOCK)
            else:
                yield plain
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        named = {"gz": "gzip", "zst": "Zstandard"}.get(kind, kind)
        raise DataError(f"{path}: not {named}, damaged or cut ({error}); fetch or compress it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _whole(file: IO[bytes], path: Path, faults: Faults) -> Iterator[tuple[int, str]]:
    try:
        yield 0, _decode(file.read(LONGEST_DOCUMENT + 1))
    except BadDocument as error:
        faults.meet(lambda: f"{path}:1", error.why)


def _documents_of_lines(file: IO[bytes], shard: Shard, take: _Take[T], faults: Faults) -> Iterator[tuple[int, T]]:
    path, stop = shard.path, sys.maxsize if is_compressed(shard.path) else shard.stop
    if shard.start > 0:
        file.seek(shard.start - 1)
        # The line that begins before this shard belongs to the one before; it may end behind this one.
        if not _skip_line(file, stop):
            return
    offset = shard.start if shard.start == 0 else file.tell()
    while offset < stop and (line := file.readline(LONGEST_DOCUMENT + 1)):
        size, is_whole = len(line), line.endswith(b"\n")
        try:
            if line.strip():
                taken = take(_parse(_decode(line)))
                line = b""  # long ones need not be held twice while their text is used
                yield offset, taken
                del taken
        except BadDocument as error:
            line = b""
            faults.meet(partial(_line_at, path, offset), error.why)
            if size > LONGEST_DOCUMENT and not is_whole:
                _skip_line(file, sys.maxsize)
                size = file.tell() - offset
        offset += size


def _skip_line(file: IO[bytes], stop: int) -> bool:
    """Read on to behind the end of the line; False where that is not before `stop`."""
    while (block := file.readline(_BLOCK)) and not block.endswith(b"\n"):
        if file.tell() >= stop:
            return False
    return True


def _documents_of_json(file: IO[bytes], path: Path, take: _Take[T], faults: Faults) -> Iterator[tuple[int, T]]:
    try:
        for number, (line, value) in enumerate(json_values(file, LONGEST_DOCUMENT)):
            try:
                yield number, take(value)
            except BadDocument as error:
                faults.meet(partial("{}:{}".format, path, line), error.why)
    except NotJson as error:
        rest = "" if faults.are_fatal else "; the rest of the file is left out"
        faults.meet(partial("{}:{}".format, path, error.line), error.why + rest)


def _documents_of_rows(
    rows: Iterator[dict[str, Any]], shard: Shard, take: _Take[T], faults: Faults
) -> Iterator[tuple[int, T]]:
    for number, row in enumerate(rows):
        try:
            taken = take(row)
            if isinstance(taken, str) and len(taken) > LONGEST_DOCUMENT:
                raise BadDocument(too_long(LONGEST_DOCUMENT))
            yield shard.group << _GROUP_SHIFT | number, taken
        except BadDocument as error:
            group = f"row group {shard.group}, " if ending_of(shard.path) == ".parquet" else ""
            faults.meet(lambda n=number, g=group: f"{shard.path}: {g}row {n}", error.why)  # type: ignore[misc]


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadDocument(why_not_json(error)) from error


_JSON_NAMES = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "an array"}


def _text_of(row: Any, text_key: str) -> str:
    if not isinstance(row, dict):
        found = _JSON_NAMES.get(type(row), "a string")
        raise BadDocument(f"no text under {text_key!r}: expected an object, found {found}")
    if text_key not in row:
        keys = ", ".join(list(row)[:10]) + (", ..." if len(row) > 10 else "")
        way_out = "name the key of the text (--text-key) or leave the file out"
        raise BadDocument(f"no text under {text_key!r}; the line has: {keys or 'nothing'}; {way_out}")
    text = row[text_key]
    if not isinstance(text, str):
        found = _JSON_NAMES.get(type(text), "an object")
        raise BadDocument(f"no text under {text_key!r}: it is {found}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadDocument(f"half a character, which UTF-8 has not ({error})") from error
    return text


def _object_of(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadDocument(f"expected an object, found {_JSON_NAMES.get(type(row), 'a string')}")
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise BadDocument(f"half a character, which UTF-8 has not ({error})") from error
    return row


def _decode(data: bytes) -> str:
    """Text of UTF-8, without a byte order mark."""
    if len(data) > LONGEST_DOCUMENT:
        raise BadDocument(too_long(LONGEST_DOCUMENT))
    try:
        return data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        guess = ", by its first bytes UTF-16" if data.startswith(_UTF16) else ""
        raise BadDocument(f"not UTF-8 (byte {error.start}{guess}); convert it with iconv") from error


def _line_at(path: Path, offset: int) -> str:
    """File and number of the line that begins `offset` bytes into the (decompressed) file."""
    number = 1
    with _opened(path) as file:
        while offset > 0 and (block := file.read(min(_BLOCK, offset))):
            number += block.count(b"\n")
            offset -= len(block)
    return f"{path}:{number}"
