"""The `torch_dist` format on disk, read and written chunk by chunk by any number of processes without a process group.

A directory holds `.distcp` files, each a sequence of tensors written by torch.save, and `.metadata`, which says for
every global tensor which chunk of it lies where. torch.distributed.checkpoint and megatron-core read what is written
here and write what is read here. Nothing is unpickled but a known set of classes.
"""

import errno
import io
import itertools
import math
import os
import pickle
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_ext.checkpoint.boxes import Shape
from megatron_ext.checkpoint.raw_io import OutputFile, TensorPlace, read_bytes
from megatron_ext.checkpoint.torch_archive import find_tensor
from megatron_ext.errors import CheckpointError
from megatron_ext.files import open_regular, write_bytes, writing
from megatron_ext.foreign import fault_of, reading
from megatron_ext.manifest import FileSum, check_manifest

METADATA_FILE = ".metadata"

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
        if fault := _fault_of_chunks(entry):
            raise CheckpointError(f"{directory}: the chunks of {key} {fault}")
    content = dcp.Metadata(state_dict_metadata={**tensors}, planner_data={}, storage_data=storage)
    path = directory / METADATA_FILE
    write_bytes(path, pickle.dumps(content))
    with writing(path), open(path, "rb") as file:
        os.fsync(file.fileno())


def _fault_of_chunks(entry: dcp.TensorStorageMetadata) -> str | None:
    """Why the chunks of a tensor do not cover it, each element once; None if they do."""
    whole = tuple(entry.size)
    offsets = np.array([tuple(chunk.offsets) for chunk in entry.chunks], dtype=np.int64).reshape(-1, len(whole))
    sizes = np.array([tuple(chunk.sizes) for chunk in entry.chunks], dtype=np.int64).reshape(-1, len(whole))
    stops = offsets + sizes
    if (offsets < 0).any() or (sizes < 0).any() or (stops > np.array(whole, dtype=np.int64)).any():
        return "reach beyond it"
    covered = sum(math.prod(map(int, size)) for size in sizes)
    if covered != math.prod(whole):
        return f"hold {covered} of {math.prod(whole)} elements"
    if len(offsets) > 1 and _overlapping(offsets[(sizes > 0).all(1)], stops[(sizes > 0).all(1)]):
        return "overlap, so elements are missing"
    return None


def _overlapping(starts: np.ndarray, stops: np.ndarray) -> bool:
    """Whether any two of the boxes [start, stop), one a row, share an element."""
    # Boxes can only overlap that follow each other closely along each dimension: along the one that is cut most.
    axis = int(np.argmax([len(np.unique(column)) for column in starts.T])) if starts.shape[1] else 0
    if not starts.shape[1]:
        return len(starts) > 1
    order = np.argsort(starts[:, axis], kind="stable")
    starts, stops = starts[order], stops[order]
    last = np.searchsorted(starts[:, axis], stops[:, axis])  # boxes from here on begin after this one ends
    for number in range(len(starts)):
        others = slice(number + 1, int(last[number]))
        apart = (starts[others] >= stops[number]) | (stops[others] <= starts[number])
        if not apart.any(1).all():
            return True
    return False


class TorchDistReader:
    """Random access to the tensors of a `torch_dist` directory, on any number of threads."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        check_manifest(directory, CheckpointError, only=(METADATA_FILE,), checksums=True)
        self._metadata = _read_metadata(directory)
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
        """Stored dtype of `key`."""
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
                if fault := _fault_of_chunks(entry):
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


class _KnownClasses(pickle.Unpickler):
    """Unpickles the few classes that checkpoint metadata is made of, by their exact names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_CLASSES:
            return super().find_class(module, name)
        raise _Refused(f"{module}.{name}")


class _Refused(Exception):
    """A pickle asks for something that checkpoint metadata has no use for."""


_DCP = "torch.distributed.checkpoint"
_METADATA_CLASSES = {
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "BytesStorageMetadata"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.metadata", "StorageMeta"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    (f"{_DCP}.filesystem", "_StoragePrefix"),
    # megatron-core keeps the plan of a save in its metadata.
    (f"{_DCP}.planner", "SavePlan"),
    (f"{_DCP}.planner", "WriteItem"),
    (f"{_DCP}.planner", "WriteItemType"),
    (f"{_DCP}.planner", "TensorWriteData"),
    (f"{_DCP}.planner", "BytesIOWriteData"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
} | {("torch", str(dtype).removeprefix("torch.")) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


def _read_metadata(directory: Path) -> dcp.Metadata:
    path = directory / METADATA_FILE
    try:
        with open_regular(path, follow_links=False) as file:
            content = _KnownClasses(io.BufferedReader(file)).load()
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} is no torch_dist checkpoint: it has no {METADATA_FILE}") from error
    except _Refused as error:
        raise CheckpointError(f"{path}: refused, it asks for {error}") from error
    except Exception as error:  # noqa: BLE001 - damaged pickles fail in any way
        raise CheckpointError(f"{path}: {fault_of(error)}") from error
    if not isinstance(content, dcp.Metadata):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not checkpoint metadata")
    with reading(path, CheckpointError):
        _check_metadata(content, path)
    return content


def _check_metadata(content: dcp.Metadata, path: Path) -> None:
    """Raise where metadata is not made of what it should be, or two chunks share bytes of a file."""
    for key, entry in content.state_dict_metadata.items():
        if not isinstance(key, str) or not isinstance(entry, dcp.TensorStorageMetadata | dcp.BytesStorageMetadata):
            raise CheckpointError(f"{path}: damaged at {key!r}")
        if isinstance(entry, dcp.TensorStorageMetadata):
            sizes = [entry.size, *(part for chunk in entry.chunks for part in (chunk.offsets, chunk.sizes))]
            whole = all(isinstance(size, torch.Size) and len(size) == len(entry.size) for size in sizes)
            if not whole or not isinstance(entry.properties.dtype, torch.dtype):
                raise CheckpointError(f"{path}: damaged at {key!r}")
    places = []
    for index, info in content.storage_data.items():
        numbers = info.offset, info.length
        if not isinstance(info.relative_path, str) or any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers):
            raise CheckpointError(f"{path}: damaged at {index.fqn!r}")
        places.append((info.relative_path, info.offset, info.offset + info.length, index.fqn))
    for (file, _, stop, one), (other_file, start, _, other) in itertools.pairwise(sorted(places)):
        if file == other_file and start < stop:
            raise CheckpointError(f"{path}: {one} and {other} lie over each other in {file}")
