"""Hugging Face directories as tensor streams: safetensors shards with an index, read lazily, written as they come."""

import json
import math
import os
import struct
from collections.abc import Collection, Mapping, Sequence
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from megatron_ext.checkpoint.raw_io import OutputFile, TensorPlace, memory_of, read_bytes
from megatron_ext.checkpoint.shards import Shape
from megatron_ext.checkpoint.streams import Prepared, TensorSink, TensorSpec
from megatron_ext.checkpoint.tokenizer_files import TEMPLATE_FOLDERS, TOKENIZER_FILES
from megatron_ext.errors import ConversionError
from megatron_ext.files import json_pairs, open_regular, read_json_object, write_text
from megatron_ext.foreign import reading
from megatron_ext.manifest import MANIFEST_FILE, FileSum, check_manifest

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_CODES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST_HEADER = 100_000_000
"""Bytes, as in the safetensors library."""
_NAMES = {dtype: code for code, dtype in _CODES.items()}


class HuggingFaceSource:
    """The weights of a Hugging Face directory, sharded or in one file.

    `repeated` are names that an index may have though no shard holds them: of tied weights, written once.
    """

    def __init__(self, directory: str | Path, repeated: Collection[str] = ()) -> None:
        self.directory = Path(directory)
        check_manifest(self.directory, ConversionError, only=(INDEX_FILE, "*.safetensors"))
        weight_map = self._read_index()
        self._files: dict[str, FileIO] = {}
        self._places: dict[str, tuple[str, TensorPlace]] = {}
        for name in sorted(set(weight_map.values())) or [SINGLE_FILE]:
            path = self.directory / name
            with reading(path, ConversionError, kind="safetensors"):
                self._files[name] = open_regular(path)
                places = _read_header(self._files[name])
            for key, place in places.items():
                if (other := self._places.setdefault(key, (name, place))[0]) != name:
                    raise ConversionError(f"{self.directory}: {key} is in both {other} and {name}; take it out of one")
        if lost := sorted(set(weight_map) - set(self._places) - set(repeated)):
            raise ConversionError(
                f"{self.directory / INDEX_FILE}: names tensors that no shard holds: {', '.join(lost[:10])}"
            )
        self.specs = {key: TensorSpec(place.shape, place.dtype) for key, (_, place) in self._places.items()}

    def _read_index(self) -> dict[str, str]:
        """The file of each tensor; empty where there is one file without an index."""
        index, single = self.directory / INDEX_FILE, self.directory / SINGLE_FILE
        if not index.is_file():
            if not single.is_file():
                advice = _advice(self.directory)
                raise ConversionError(f"{self.directory}: has neither {INDEX_FILE} nor {SINGLE_FILE}{advice}")
            return {}
        weight_map = read_json_object(index, ConversionError, unique=True).get("weight_map", {})
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConversionError(f"{index}: has no weight_map")
        for key, name in weight_map.items():
            # Links may lead out of the folder, as they do in the hub's cache; what a file says may not.
            if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ConversionError(f"{index}: {key} is in {name!r}: expected the name of a file beside")
        if single.is_file() and SINGLE_FILE not in weight_map.values():
            raise ConversionError(
                f"{self.directory}: has both {SINGLE_FILE} and an {INDEX_FILE} of other files, and readers differ "
                "in which they take; move the one that is not meant out of the folder"
            )
        return weight_map

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        shape = self.specs[name].shape
        return self.read_box(name, (0,) * len(shape), shape)

    def read_box(self, name: str, offset: Shape, size: Shape) -> Tensor:
        """The part of a tensor that starts at `offset` and has the shape `size`; no more is read."""
        file, place = self._places[name]
        box = tuple(slice(start, start + count) for start, count in zip(offset, size, strict=True))
        try:
            if (mapped := place.map_box(self._files[file].fileno(), box)) is not None:
                return mapped
            target = torch.empty(size, dtype=place.dtype)
            place.read_box(self._files[file].fileno(), box, target)
        except EOFError as error:
            raise ConversionError(f"{self.directory / file}: ends inside {name}") from error
        except OSError as error:
            raise ConversionError(f"{self.directory / file}: {name}: {error.strerror}") from error
        return target


def _advice(directory: str | Path) -> str:
    """What to do where weights are there in another format."""
    if not any(Path(directory).glob("pytorch_model*.bin")):
        return ""
    return (
        ". pytorch_model.bin is not read: the format can carry code. If you trust it, make safetensors of it: "
        f"python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{directory}', "
        "dtype='auto').save_pretrained('NEW')\", and copy the tokenizer beside"
    )


def _read_header(file: FileIO) -> dict[str, TensorPlace]:
    """Where each tensor of a safetensors file lies. As the format demands, they fill the file without gap or overlap.

    Raises:
        ValueError, EOFError: it is none, or not whole.
    """
    end = os.fstat(file.fileno()).st_size
    (length,) = struct.unpack("<Q", read_bytes(file.fileno(), 0, 8))
    if length > min(end - 8, _LONGEST_HEADER):
        raise ValueError(f"its header would have {length} bytes, the file has {end}")
    header = json.loads(read_bytes(file.fileno(), 8, length), object_pairs_hook=json_pairs)
    if not isinstance(header, dict):
        raise ValueError("its header is no mapping")
    places = {name: _place(name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
    last, before = 8 + length, "the header"
    for name, place in sorted(places.items(), key=lambda entry: (entry[1].start, _bytes_of(entry[1]))):
        if place.start != last:
            raise ValueError(f"{name} begins at {place.start}, but {before} ends at {last}")
        last, before = last + _bytes_of(place), name
    if last != end:
        raise ValueError(f"it has {end} bytes, its header describes {last}")
    return places


def _place(name: str, entry: Any, base: int) -> TensorPlace:
    try:
        code, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and 0 <= number < 1 << 63 for number in (start, stop, *shape))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{name} is not described") from error
    if not isinstance(code, str) or code not in _CODES:
        raise ValueError(f"{name} is {code}; convert it to BF16 first")
    if not whole or math.prod(size for size in shape if size) >= 1 << 60:
        raise ValueError(f"{name} is {list(shape)} {code} at {start} to {stop}")
    place = TensorPlace(base + start, shape, _CODES[code])
    if stop - start != _bytes_of(place):
        raise ValueError(f"{name} is {list(shape)} {code}, but has the bytes {start} to {stop}")
    return place


def _bytes_of(place: TensorPlace) -> int:
    return TensorSpec(place.shape, place.dtype).bytes


class HuggingFaceSink(TensorSink):
    """Writes safetensors shards without holding more than the tensor at hand.

    Shards are laid out from the announced shapes: headers first, then each tensor at its place as it comes.
    """

    contents = (
        *("*.safetensors", INDEX_FILE, "config.json", MANIFEST_FILE, "README.md", "*.py"),
        *TOKENIZER_FILES,
        *TEMPLATE_FOLDERS,
    )

    def __init__(
        self,
        target: str | Path,
        specs: Mapping[str, TensorSpec],
        *,
        shard_bytes: int = 5 * 10**9,
        force: bool = False,
        inputs: Sequence[Path] = (),
    ) -> None:
        super().__init__(Path(target), specs, force=force, inputs=inputs)
        self._shard_bytes = shard_bytes
        self._places: dict[str, tuple[OutputFile, int]] = {}
        self._files: list[OutputFile] = []
        self._closed: dict[str, FileSum] = {}

    def _open(self) -> None:
        shards = _split_into_shards(self.specs, self._shard_bytes)
        for number, names in enumerate(shards, start=1):
            file_name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._open_shard(file_name, names)
        if len(shards) > 1:
            self._write_index(shards)

    def _open_shard(self, file_name: str, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            spec = self.specs[name]
            start, end = end, end + spec.bytes
            header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = OutputFile(self.partial / file_name)
        self._files.append(file)
        file.write(0, struct.pack("<Q", len(text)) + text)
        start = 8 + len(text)
        file.reserve(start + end)
        for name in names:
            self._places[name] = (file, start)
            start += self.specs[name].bytes

    def _write_index(self, shards: list[list[str]]) -> None:
        count = len(shards)
        weight_map = {
            name: f"model-{number:05d}-of-{count:05d}.safetensors"
            for number, names in enumerate(shards, start=1)
            for name in names
        }
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        write_text(self.partial / INDEX_FILE, json.dumps(index, indent=2) + "\n")

    def _prepare(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.contiguous()

    def _store(self, prepared: Prepared) -> None:
        file, start = self._places[prepared.name]
        file.write(start, memory_of(prepared.content))

    def _close(self) -> None:
        while self._files:
            file = self._files.pop()
            self._closed[file.path.name] = file.finish(sync=False)

    def _sums(self) -> dict[str, FileSum]:
        return self._closed


def _split_into_shards(specs: Mapping[str, TensorSpec], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.bytes
    return shards
