"""One tensor in the container that torch.save writes: where its elements lie, so that any part is read alone.

The container is an uncompressed zip archive: a pickle says dtype, size and strides, a record of raw bytes holds the
elements. Knowing the record's place, a part of a chunk of many gigabytes costs only its own bytes.
"""

import collections
import io
import os
import pickle
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ext.checkpoint.raw_io import TensorPlace, read_bytes
from megatron_ext.checkpoint.shards import Shape

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""What a pickle calls the elements' dtypes."""
_LOCAL_MAGIC = b"PK\x03\x04"


def find_tensor(descriptor: int, start: int, length: int) -> TensorPlace | None:
    """Where the elements of the archive at [start, start + length) of a file lie; None if it is of another kind.

    Raises:
        zipfile.BadZipFile, pickle.UnpicklingError, EOFError, KeyError, ValueError: it is damaged.
    """
    if os.fstat(descriptor).st_size < start + length:
        raise EOFError
    # Checksums are not looked at: torch.save may be told not to write them.
    with zipfile.ZipFile(_Window(descriptor, start, length)) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
            return None
    places = {name: _record(descriptor, start, length, info) for name, info in records.items()}
    if "byteorder" in places and read_bytes(descriptor, *places["byteorder"]) != b"little":
        return None
    described = _TensorPickle(io.BytesIO(read_bytes(descriptor, *places["data.pkl"]))).load()
    if not isinstance(described, _Described) or not described.is_whole:
        return None
    data, size = places[f"data/{described.storage.key}"]
    if size != described.storage.bytes:
        raise zipfile.BadZipFile("the record of the elements has another size")
    return TensorPlace(data, described.size, described.storage.dtype)


def _record(descriptor: int, start: int, length: int, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Position in the file and size of one record of the archive at [start, start + length)."""
    header = read_bytes(descriptor, start + info.header_offset, _LOCAL_HEADER.size)
    magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    position = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if magic != _LOCAL_MAGIC or position + info.file_size > length:
        raise zipfile.BadZipFile(f"{info.filename} is not where it should be")
    return start + position, info.file_size


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._position = descriptor, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        data = os.pread(self._descriptor, wanted, self._start + self._position)
        self._position += len(data)
        return data


@dataclass(frozen=True)
class _Storage:
    """What the pickle says of the elements' record."""

    key: str
    dtype: torch.dtype
    count: int

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class _Described:
    """What the pickle says of the tensor."""

    storage: _Storage
    offset: int
    size: Shape
    stride: Shape

    @property
    def is_whole(self) -> bool:
        """Whether the tensor is its whole storage in row-major order."""
        plain = torch.empty(self.size, device="meta")
        return self.offset == 0 and plain.stride() == self.stride and plain.numel() == self.storage.count


def _described(
    storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any
) -> _Described:
    return _Described(storage, offset, tuple(size), tuple(stride))


class _TensorPickle(pickle.Unpickler):
    """Reads the description of a plain tensor without making one. Whatever else a pickle asks for is not made."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _described
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        return _STORAGES.get(name, _Unknown) if module == "torch" else _Unknown

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            return _Unknown()
        return _Storage(key, dtype, count)


class _Unknown:
    """Stands for anything that is not part of a plain tensor."""

    def __init__(self, *args: Any) -> None:
        pass
