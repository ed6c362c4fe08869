"""Megatron's indexed dataset on disk: token ids in `.bin`, document lengths in `.idx`; megatron-core reads it."""

import os
import struct
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_ext.errors import DataError
from megatron_ext.files import UNFINISHED, open_regular, writing

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_BLOCK = 1 << 20
"""Documents that are described at once."""
_DTYPE_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}


def token_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """The smallest dtype that holds every token id."""
    return np.dtype(np.uint16) if vocab_size <= 2**16 else np.dtype(np.int32)


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype[np.generic]) -> None:
    """Write the `.idx` of a `.bin` whose documents have `lengths` tokens of `dtype`, one sequence a document."""
    count = len(lengths)
    with open(path, "wb") as file:
        file.write(_HEADER.pack(_MAGIC, _VERSION, _DTYPE_CODES[dtype], count, count + 1))
        for start in range(0, count, _BLOCK):
            file.write(lengths[start : start + _BLOCK].astype(np.int32).tobytes())
        pointer = 0
        for start in range(0, count, _BLOCK):
            sizes = lengths[start : start + _BLOCK].astype(np.int64) * dtype.itemsize
            file.write((pointer + np.cumsum(sizes) - sizes).tobytes())
            pointer += int(sizes.sum())
        for start in range(0, count + 1, _BLOCK):
            file.write(np.arange(start, min(start + _BLOCK, count + 1), dtype=np.int64).tobytes())
        sync(file)


def check_index(path: Path, documents: int, dtype: np.dtype[np.generic]) -> None:
    """Check that the `.idx` at `path` is whole and is that of `documents` documents of `dtype`.

    Raises:
        DataError: says what is wrong.
    """
    expected = (_MAGIC, _VERSION, _DTYPE_CODES[dtype], documents, documents + 1)
    with open(path, "rb") as file:
        header, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
    whole = _HEADER.size + 4 * documents + 8 * documents + 8 * (documents + 1)
    if len(header) < _HEADER.size or _HEADER.unpack(header) != expected or size != whole:
        raise DataError(
            f"{path}: not the index of {documents} documents of {dtype}, cut or changed; "
            "take it from a copy, or prepare the data again with tools/preprocess.py"
        )


def sync(file: IO[Any]) -> None:
    """Wait until what was written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def write_synced(path: Path, data: bytes) -> None:
    """Write the file at `path`: after any fault, a cut of power included, it has its old content or all of `data`."""
    beside = path.with_name(path.name + UNFINISHED)
    with writing(path), open(beside, "wb") as file:
        file.write(data)
        sync(file)
    beside.replace(path)


def read_index(path: Path) -> tuple[np.dtype[Any], np.ndarray[Any, Any]]:
    """The dtype of the tokens beside the `.idx` at `path`, and how many tokens each document has (mapped, int32).

    Raises:
        DataError: it is missing, cut, or none of ours.
    """
    dtypes: dict[int, Any] = {code: dtype for dtype, code in _DTYPE_CODES.items()}
    try:
        with open_regular(path) as file:
            header = file.read(_HEADER.size)
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; give a dataset as data.train has it, such as data/ja/train, or its .bin"
        ) from error
    magic, version, code, documents, _ = _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", 0, 0, 0, 0)
    if (magic, version) != (_MAGIC, _VERSION) or code not in dtypes or not documents:
        raise DataError(f"{path}: not an index that tools/preprocess.py writes, or cut")
    check_index(path, documents, dtypes[code])
    return dtypes[code], np.memmap(path, np.int32, "r", _HEADER.size, (documents,))
