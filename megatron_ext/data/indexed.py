"""Megatron's indexed dataset on disk: token ids in `.bin`, document lengths in `.idx`; megatron-core reads it."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_DTYPE_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}


def token_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """The smallest dtype that holds every token id."""
    return np.dtype(np.uint16) if vocab_size <= 2**16 else np.dtype(np.int32)


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype[np.generic]) -> None:
    """Write the `.idx` of a `.bin` whose documents have `lengths` tokens of `dtype`, one sequence a document."""
    lengths = lengths.astype(np.int32)
    pointers = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1].astype(np.int64) * dtype.itemsize, out=pointers[1:])
    documents = np.arange(len(lengths) + 1, dtype=np.int64)
    with open(path, "wb") as file:
        file.write(_MAGIC + struct.pack("<QBQQ", _VERSION, _DTYPE_CODES[dtype], len(lengths), len(documents)))
        for array in (lengths, pointers, documents):
            file.write(array.tobytes())


def concatenate(parts: Sequence[Path], target: Path) -> None:
    """Join files end to end."""
    with open(target, "wb") as out:
        for part in parts:
            with open(part, "rb") as file:
                while block := file.read(1 << 24):
                    out.write(block)
