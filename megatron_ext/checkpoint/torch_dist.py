"""The `torch_dist` format on disk, read and written chunk by chunk by any number of processes without a process group.

A directory holds `.distcp` files, each a sequence of tensors written by torch.save, and `.metadata`, which says for
every global tensor which chunk of it lies where. torch.distributed.checkpoint and megatron-core read what is written
here and write what is read here. Nothing is unpickled but a known set of classes.
"""

import errno
import io
import os
import pickle
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_ext.checkpoint.metadata import METADATA_FILE as METADATA_FILE
from megatron_ext.checkpoint.metadata import fault_of_chunks, read_metadata
from megatron_ext.checkpoint.raw_io import OutputFile, TensorPlace, read_bytes
from megatron_ext.checkpoint.shards import Shape
from megatron_ext.checkpoint.torch_archive import find_tensor
from megatron_ext.errors import CheckpointError
from megatron_ext.files import open_regular, write_bytes, writing
from megatron_ext.foreign import reading
from megatron_ext.manifest import FileSum, check_manifest

# Bytes; torch.save writes headers of a few dozen and pads with less than a hundred.
_SMALL = 4096
_ALIGNMENT = 64

# torch's switch for checksums is one for the whole process.
_WITHOUT_CHECKSUMS = threading.Lock()


@dataclass(frozen=True)
class ChunkRecord:
    """Where one chunk of a global tensor lies."""

    key: str
    dtype: torch.dtype
    global_shape: Shape
    offset: Shape
    size: Shape
    file: str
    start: int
    length: int


class TorchDistWriter:
    """Appends chunks to one file. Each process has its own, and its own `name`; `write_metadata` then joins them.

    Threads may write at the same time: what is reserved first stands first in the file.
    """

    def __init__(self, directory: Path, name: str = "__0_0.distcp") -> None:
        self.records: list[ChunkRecord] = []
        self.name = name
        self.length = 0
        """Bytes of the file when everything reserved is written."""
        self.sum = FileSum(0, 0)
        """Size and checksum of the file once it is finished."""
        self._file: OutputFile | None = OutputFile(directory / name)

    def write(self, key: str, global_shape: Shape, offset: Shape, data: Tensor) -> None:
        """Append `data`, the chunk of `key` at `offset`; its memory is not kept."""
        archive = TensorArchive(data)
        self.put(archive, self.reserve(key, global_shape, offset, archive))

    def reserve(self, key: str, global_shape: Shape, offset: Shape, archive: "TensorArchive") -> int:
        """The place in the file of a chunk that `put` will write. Not for several threads at once."""
        # Aligned, elements can be used where they lie: their record begins at a multiple of 64 within the archive.
        start = -(-self.length // _ALIGNMENT) * _ALIGNMENT
        self.length = start + archive.length
        size = tuple(archive.tensor.shape)
        dtype = archive.tensor.dtype
        self.records.append(ChunkRecord(key, dtype, global_shape, offset, size, self.name, start, archive.length))
        return start

    def put(self, archive: "TensorArchive", start: int) -> None:
        """Write a chunk at its place."""
        assert self._file is not None
        for piece in archive.pieces:
            self._file.write(start, piece)
            start += len(piece)

    def finish(self, *, sync: bool = True) -> list[ChunkRecord]:
        """Close the file, with `sync` only once everything is on disk, and return what was written."""
        if self._file is not None:
            self.sum = self._file.finish(sync=sync)
            self._file = None
        return self.records

    def abandon(self) -> None:
        """Close the file after a failure."""
        if self._file is not None:
            self._file.abandon()
            self._file = None


class TensorArchive:
    """A tensor as torch.save writes it: pieces of bytes, of which the elements are the tensor's own memory."""

    def __init__(self, data: Tensor) -> None:
        whole = data.detach().to("cpu")
        # A view would drag its whole storage into the file.
        whole = whole.clone() if whole.untyped_storage().nbytes() != whole.numel() * whole.itemsize else whole
        self.tensor = whole.contiguous()
        self.pieces: list[memoryview | bytes] = []
        with _WITHOUT_CHECKSUMS:
            before = get_crc32_options()
            set_crc32_options(False)  # as long as writing takes, and no reader looks at them
            try:
                torch.save(self.tensor, cast("IO[bytes]", self))
            finally:
                set_crc32_options(before)
        self.length = sum(map(len, self.pieces))

    def write(self, piece: memoryview | bytes) -> int:
        """Take a piece from torch.save. Only the elements stay where they are when it goes on."""
        if len(piece) > _SMALL and len(piece) == self.tensor.numel() * self.tensor.itemsize:
            self.pieces.append(piece)
        elif self.pieces and isinstance(self.pieces[-1], bytes):
            self.pieces[-1] += bytes(piece)
        else:
            self.pieces.append(bytes(piece))
        return len(piece)

    def flush(self) -> None:
        """Nothing is held back; torch.save asks."""


def write_metadata(directory: Path, records: Iterable[ChunkRecord]) -> None:
    """Write `.metadata` for the chunks of all files of `directory`.

    Raises:
        CheckpointError: the chunks of a tensor do not cover it exactly.
    """
    tensors: dict[str, dcp.TensorStorageMetadata] = {}
    storage: dict[dcp.MetadataIndex, _StorageInfo] = {}
    for record in records:
        entry = tensors.get(record.key)
        if entry is None:
            properties = dcp.TensorProperties(dtype=record.dtype)
            entry = tensors[record.key] = dcp.TensorStorageMetadata(properties, torch.Size(record.global_shape), [])
        index = dcp.MetadataIndex(record.key, record.offset, len(entry.chunks))
        entry.chunks.append(dcp.ChunkStorageMetadata(torch.Size(record.offset), torch.Size(record.size)))
        storage[index] = _StorageInfo(record.file, record.start, record.length)
    for key, entry in tensors.items():
        if fault := fault_of_chunks(entry):
            raise CheckpointError(f"{directory}: the chunks of {key} {fault}")
    content = dcp.Metadata(state_dict_metadata={**tensors}, planner_data={}, storage_data=storage)
    path = directory / METADATA_FILE
    write_bytes(path, pickle.dumps(content))
    with writing(path), open(path, "rb") as file:
        os.fsync(file.fileno())


class TorchDistReader:
    """Random access to the tensors of a `torch_dist` directory, on any number of threads."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        check_manifest(directory, CheckpointError, only=(METADATA_FILE,), checksums=True)
        self._metadata = read_metadata(directory)
        self._files: dict[str, FileIO] = {}
        self._places: dict[tuple[str, int], TensorPlace | None] = {}
        self._checked: set[str] = set()
        self._opening = threading.Lock()
        self.tensors: dict[str, dcp.TensorStorageMetadata] = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, dcp.TensorStorageMetadata)
        }

    def shape(self, key: str) -> Shape:
        """Global shape of `key`."""
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """StorageLocation dtype of `key`."""
        return self.tensors[key].properties.dtype

    def read_into(self, key: str, offset: Shape, target: Tensor) -> None:
        """Fill `target` with the box of `key` at `offset`, converting the dtype where it differs."""
        filled = 0
        for chunk, info in self._chunks(key):
            overlap = _overlap(offset, tuple(target.shape), tuple(chunk.offsets), tuple(chunk.sizes))
            if overlap is None:
                continue
            in_target, in_chunk = overlap
            part = target[in_target]
            self._fill(part, key, info, in_chunk, tuple(chunk.sizes))
            filled += part.numel()
        if filled != target.numel():
            raise CheckpointError(
                f"{self.directory}: {key} at {offset}: {filled} of {target.numel()} elements are stored"
            )

    def read(self, key: str, offset: Shape | None = None, size: Shape | None = None) -> Tensor:
        """Return the box of `key` at `offset` of `size`; the whole tensor by default."""
        whole = self.shape(key)
        offset, size = offset if offset is not None else (0,) * len(whole), size if size is not None else whole
        if (mapped := self._mapped(key, offset, size)) is not None:
            return mapped
        target = torch.empty(size, dtype=self.dtype(key))
        self.read_into(key, offset, target)
        return target

    def _mapped(self, key: str, offset: Shape, size: Shape) -> Tensor | None:
        """A box in the system's own memory of a file; None unless it lies there in one piece."""
        for chunk, info in self._chunks(key):
            overlap = _overlap(offset, size, tuple(chunk.offsets), tuple(chunk.sizes))
            if overlap is not None:
                box = overlap[1]
                if tuple(part.stop - part.start for part in box) != size:
                    return None
                with self._reading(key, info) as (descriptor, place):
                    fits = place is not None and place.shape == tuple(chunk.sizes) and place.dtype == self.dtype(key)
                    return place.map_box(descriptor, box) if place is not None and fits else None
        return None

    def _chunks(self, key: str) -> Iterator[tuple[dcp.ChunkStorageMetadata, _StorageInfo]]:
        entry = self.tensors[key]
        if key not in self._checked:
            with reading(self.directory / METADATA_FILE, CheckpointError):
                if fault := fault_of_chunks(entry):
                    raise CheckpointError(f"{self.directory / METADATA_FILE}: the chunks of {key} {fault}")
            self._checked.add(key)
        for chunk in entry.chunks:
            info = self._metadata.storage_data.get(dcp.MetadataIndex(key, chunk.offsets))
            if info is None:
                raise CheckpointError(f"{self.directory / METADATA_FILE}: does not say where {key} lies")
            yield chunk, info

    def _fill(self, part: Tensor, key: str, info: _StorageInfo, box: tuple[slice, ...], size: Shape) -> None:
        """Read the elements at `box` of one chunk, which has `size`."""
        with self._reading(key, info) as (descriptor, place):
            if place is not None and place.shape == size:
                place.read_box(descriptor, box, part)
            else:
                data = io.BytesIO(read_bytes(descriptor, info.offset, info.length))
                part.copy_(torch.load(data, map_location="cpu", weights_only=True).view(size)[box])

    @contextmanager
    def _reading(self, key: str, info: _StorageInfo) -> Iterator[tuple[int, TensorPlace | None]]:
        """Give the file of a chunk and where its elements lie; turn what goes wrong with it into CheckpointError."""
        descriptor = self._open(info.relative_path)
        try:
            where = info.relative_path, info.offset
            if where not in self._places:
                self._places[where] = find_tensor(descriptor, info.offset, info.length)
            yield descriptor, self._places[where]
        except CheckpointError:
            raise
        except EOFError as error:
            raise CheckpointError(f"{self.directory}: {info.relative_path} ends inside {key}") from error
        except OSError as error:
            raise CheckpointError(f"{self.directory}: {info.relative_path}: {error.strerror}") from error
        except Exception as error:  # noqa: BLE001 - damaged archives fail in any way
            raise CheckpointError(f"{self.directory}: {info.relative_path}: {key} is damaged") from error

    def _open(self, name: str) -> int:
        """Descriptor of one of the files."""
        with self._opening:
            if name not in self._files:
                self._files[name] = self._opened(name)
            return self._files[name].fileno()

    def _opened(self, name: str) -> FileIO:
        if Path(name).name != name:
            raise CheckpointError(f"{self.directory / METADATA_FILE}: names {name!r}, which is no file beside it")
        try:
            return open_regular(self.directory / name, follow_links=False)
        except OSError as error:
            why = "is a link; copy the file here" if error.errno == errno.ELOOP else error.strerror
            raise CheckpointError(f"{self.directory}: {name}: {why}") from error

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def _overlap(
    offset: Shape, size: Shape, chunk_offset: Shape, chunk_size: Shape
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Slices of a box and of a chunk that show the same elements; None where they do not meet."""
    in_box, in_chunk = [], []
    for start, length, chunk_start, chunk_length in zip(offset, size, chunk_offset, chunk_size, strict=True):
        low, high = max(start, chunk_start), min(start + length, chunk_start + chunk_length)
        if low >= high:
            return None
        in_box.append(slice(low - start, high - start))
        in_chunk.append(slice(low - chunk_start, high - chunk_start))
    return tuple(in_box), tuple(in_chunk)
