"""Hugging Face directories as tensor streams: safetensors shards with an index, read lazily, written as they come."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ext.checkpoint.boxes import Shape
from megatron_ext.checkpoint.store import TOKENIZER_FILES
from megatron_ext.checkpoint.tensors import TensorSink, TensorSpec
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
    """The weights of a Hugging Face directory, sharded or in one file."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        index, single = self.directory / INDEX_FILE, self.directory / SINGLE_FILE
        weight_map: dict[str, str] = {}
        if index.is_file():
            weight_map = read_json_object(index, ConversionError).get("weight_map", {})
            if not isinstance(weight_map, dict) or not weight_map:
                raise ConversionError(f"{index}: has no weight_map")
            files = sorted(set(weight_map.values()))
        elif single.is_file():
            files = [SINGLE_FILE]
        else:
            raise ConversionError(f"{self.directory}: has neither {INDEX_FILE} nor {SINGLE_FILE}")
        self._handles = {}
        self._file_of: dict[str, str] = {}
        for name in files:
            try:
                self._handles[name] = safe_open(self.directory / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ConversionError(f"{self.directory / name}: {error}") from error
            self._file_of.update({key: name for key in self._handles[name].keys()})  # noqa: SIM118 - not a dict
        if lost := sorted(set(weight_map) - set(self._file_of)):
            raise ConversionError(f"{index}: names tensors that no shard holds: {', '.join(lost[:10])}")
        self.specs = {key: self._spec(key) for key in self._file_of}

    def _spec(self, key: str) -> TensorSpec:
        view = self._handles[self._file_of[key]].get_slice(key)
        code = view.get_dtype()
        if code not in _CODES:
            raise ConversionError(f"{self.directory / self._file_of[key]}: {key} is {code}; convert it to BF16 first")
        return TensorSpec(tuple(view.get_shape()), _CODES[code])

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        tensor: Tensor = self._handles[self._file_of[name]].get_tensor(name)
        return tensor

    def read_box(self, name: str, offset: Shape, size: Shape) -> Tensor:
        """The part of a tensor that starts at `offset` and has the shape `size`; no more is read."""
        view = self._handles[self._file_of[name]].get_slice(name)
        part: Tensor = view[tuple(slice(start, start + count) for start, count in zip(offset, size, strict=True))]
        return part


class HuggingFaceSink(TensorSink):
    """Writes safetensors shards without holding more than the tensor at hand.

    Shards are laid out from the announced shapes: headers first, then each tensor at its place as it comes.
    """

    contents = ("*.safetensors", INDEX_FILE, "config.json", "generation_config.json", "*.py", *TOKENIZER_FILES)

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
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._files: list[BinaryIO] = []
        shards = _split_into_shards(self.specs, shard_bytes)
        for number, names in enumerate(shards, start=1):
            file_name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._open_shard(file_name, names)
        if len(shards) > 1:
            self._write_index(shards)

    def _open_shard(self, file_name: str, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + _bytes(self.specs[name])
            spec = self.specs[name]
            header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file: BinaryIO = open(self.partial / file_name, "wb")  # noqa: SIM115 - closed by _close
        self._files.append(file)
        file.write(struct.pack("<Q", len(text)) + text)
        base = file.tell()
        file.truncate(base + end)
        start = base
        for name in names:
            self._places[name] = (file, start)
            start += _bytes(self.specs[name])

    def _write_index(self, shards: list[list[str]]) -> None:
        count = len(shards)
        weight_map = {
            name: f"model-{number:05d}-of-{count:05d}.safetensors"
            for number, names in enumerate(shards, start=1)
            for name in names
        }
        total = sum(_bytes(spec) for spec in self.specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self.partial / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def _store(self, name: str, tensor: Tensor) -> None:
        file, start = self._places[name]
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        try:
            file.seek(start)
            file.write(data.data)
        except OSError as error:
            raise ConversionError(f"{self.target}: cannot write {name}: {error.strerror}") from error

    def _close(self) -> None:
        for file in self._files:
            file.close()


def _bytes(spec: TensorSpec) -> int:
    return torch.Size(spec.shape).numel() * spec.dtype.itemsize


def _split_into_shards(specs: Mapping[str, TensorSpec], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + _bytes(spec) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(spec)
    return shards
