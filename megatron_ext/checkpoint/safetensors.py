"""Hugging Face directories as tensor streams: safetensors shards with an index, read lazily, written as they come."""

import json
import os
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_ext.checkpoint.boxes import Shape
from megatron_ext.checkpoint.raw_io import TensorPlace, memory_of, read_bytes, write_at
from megatron_ext.checkpoint.store import TOKENIZER_FILES
from megatron_ext.checkpoint.tensors import Prepared, TensorSink, TensorSpec
from megatron_ext.errors import ConversionError
from megatron_ext.files import read_json_object

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
_NAMES = {dtype: code for code, dtype in _CODES.items()}


class HuggingFaceSource:
    """The weights of a Hugging Face directory, sharded or in one file.

    `repeated` are names that an index may have though no shard holds them: of tied weights, written once.
    """

    def __init__(self, directory: str | Path, repeated: Collection[str] = ()) -> None:
        self.directory = Path(directory)
        index, single = self.directory / INDEX_FILE, self.directory / SINGLE_FILE
        weight_map: dict[str, str] = {}
        if index.is_file():
            weight_map = read_json_object(index, ConversionError).get("weight_map", {})
            if not isinstance(weight_map, dict) or not weight_map:
                raise ConversionError(f"{index}: has no weight_map")
            files = sorted(set(weight_map.values()))
            if single.is_file() and SINGLE_FILE not in files:
                raise ConversionError(
                    f"{self.directory}: has both {SINGLE_FILE} and an {INDEX_FILE} of other files, and readers differ "
                    "in which they take; move the one that is not meant out of the folder"
                )
        elif single.is_file():
            files = [SINGLE_FILE]
        else:
            raise ConversionError(f"{self.directory}: has neither {INDEX_FILE} nor {SINGLE_FILE}{_advice(directory)}")
        self._files: dict[str, BinaryIO] = {}
        self._places: dict[str, tuple[str, TensorPlace]] = {}
        for name in files:
            path = self.directory / name
            try:
                self._files[name] = open(path, "rb", buffering=0)  # noqa: SIM115 - as long as this object is there
                places = _read_header(self._files[name])
            except (OSError, EOFError, ValueError) as error:
                raise ConversionError(f"{path}: no complete safetensors file ({error})") from error
            for key, place in places.items():
                if (other := self._places.setdefault(key, (name, place))[0]) != name:
                    raise ConversionError(f"{self.directory}: {key} is in both {other} and {name}; take it out of one")
        if lost := sorted(set(weight_map) - set(self._places) - set(repeated)):
            raise ConversionError(f"{index}: names tensors that no shard holds: {', '.join(lost[:10])}")
        self.specs = {key: TensorSpec(place.shape, place.dtype) for key, (_, place) in self._places.items()}

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


def _read_header(file: BinaryIO) -> dict[str, TensorPlace]:
    """Where each tensor of a safetensors file lies.

    Raises:
        ValueError, EOFError: it is none, or not whole.
    """
    end = os.fstat(file.fileno()).st_size
    (length,) = struct.unpack("<Q", read_bytes(file.fileno(), 0, 8))
    if length > end - 8:
        raise ValueError("its header is longer than the file")
    header = json.loads(read_bytes(file.fileno(), 8, length))
    if not isinstance(header, dict):
        raise ValueError("its header is no mapping")
    places, last = {}, 8 + length
    for name, entry in header.items():
        if name != "__metadata__":
            places[name] = _place(name, entry, 8 + length, end)
            last = max(last, places[name].start + TensorSpec(places[name].shape, places[name].dtype).bytes)
    if last != end:
        raise ValueError(f"it has {end} bytes, its header describes {last}")
    return places


def _place(name: str, entry: Any, base: int, end: int) -> TensorPlace:
    try:
        code, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{name} is not described") from error
    if code not in _CODES:
        raise ValueError(f"{name} is {code}; convert it to BF16 first")
    place = TensorPlace(base + start, shape, _CODES[code])
    if min(start, *shape, 0) < 0 or base + stop > end or stop - start != TensorSpec(shape, place.dtype).bytes:
        raise ValueError(f"{name} is {list(shape)} {code}, but has the bytes {start} to {stop}")
    return place


class HuggingFaceSink(TensorSink):
    """Writes safetensors shards without holding more than the tensor at hand.

    Shards are laid out from the announced shapes: headers first, then each tensor at its place as it comes.
    """

    contents = ("*.safetensors", INDEX_FILE, "config.json", "README.md", "*.py", *TOKENIZER_FILES)

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
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._files: list[BinaryIO] = []

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
        file: BinaryIO = open(self.partial / file_name, "wb", buffering=0)  # noqa: SIM115 - closed by _close
        self._files.append(file)
        file.write(struct.pack("<Q", len(text)) + text)
        base = file.tell()
        file.truncate(base + end)
        start = base
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
        (self.partial / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def _prepare(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.contiguous()

    def _store(self, prepared: Prepared) -> None:
        file, start = self._places[prepared.name]
        write_at(file.fileno(), start, memory_of(prepared.content))

    def _close(self) -> None:
        for file in self._files:
            file.close()


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
