"""`.metadata` of the torch_dist format: read without running what is in it, and held to what it must say.

It is a pickle. Nothing is made of it but a known set of classes; their content may still be anything, so shapes, places
and names are checked before they are used.
"""

import io
import itertools
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import metadata as dcp

from megatron_ext.errors import CheckpointError
from megatron_ext.files import open_regular
from megatron_ext.foreign import fault_of, reading

METADATA_FILE = ".metadata"


def read_metadata(directory: Path) -> dcp.Metadata:
    """The metadata of a torch_dist directory; CheckpointError where it has none that can be trusted."""
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


def fault_of_chunks(entry: dcp.TensorStorageMetadata) -> str | None:
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
    """Whether any two of the shards [start, stop), one a row, share an element."""
    # Boxes can only overlap that follow each other closely along each dimension: along the one that is cut most.
    axis = int(np.argmax([len(np.unique(column)) for column in starts.T])) if starts.shape[1] else 0
    if not starts.shape[1]:
        return len(starts) > 1
    order = np.argsort(starts[:, axis], kind="stable")
    starts, stops = starts[order], stops[order]
    last = np.searchsorted(starts[:, axis], stops[:, axis])  # shards from here on begin after this one ends
    for number in range(len(starts)):
        others = slice(number + 1, int(last[number]))
        apart = (starts[others] >= stops[number]) | (stops[others] <= starts[number])
        if not apart.any(1).all():
            return True
    return False


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
