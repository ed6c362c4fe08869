"""The tensors of a Hugging Face directory under the one set of names that rules have, however they are stored."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.mxfp4 import GROUP, unpacked
from megatron_ext.architectures.tables.storage_variants import Drop, Stacked
from megatron_ext.canonical.catalogue import Shape
from megatron_ext.checkpoint.streams import TensorSpec
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConversionError

BLOCKS, SCALES = "_blocks", "_scales"


class PartSource(Protocol):
    """Named tensors of which a part can be read without the rest."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor."""

    def read(self, name: str) -> Tensor:
        """One whole tensor."""

    def read_box(self, name: str, offset: Shape, size: Shape) -> Tensor:
        """The part of a tensor that starts at `offset` and has the shape `size`."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: the whole of `key`, or a part of it."""

    key: str
    box: tuple[Shape, Shape] | None = None

    def read(self, source: PartSource) -> Tensor:
        return source.read(self.key) if self.box is None else source.read_box(self.key, *self.box).squeeze(0)


@dataclass(frozen=True)
class _PackedPlace:
    """Where an expert's tensor is packed: its part of two tensors of all experts, unpacked and turned as it is read."""

    key: str
    """The tensor without `_blocks` and `_scales`."""
    expert: int

    def read(self, source: PartSource) -> Tensor:
        blocks, scales = (self._part(source, f"{self.key}{end}") for end in (BLOCKS, SCALES))
        return unpacked(blocks, scales).t()

    def _part(self, source: PartSource, key: str) -> Tensor:
        shape = source.specs[key].shape[1:]
        return source.read_box(key, (self.expert, *(0 for _ in shape)), (1, *shape)).squeeze(0)


class NormalizedHfSource:
    """The tensors of `source` under the names that an architecture's rules have.

    They are read as lazily as from `source`. What it does not know keeps its name, so that whoever accounts for the
    tensors reports it.

    Attributes:
        dropped: names of tensors that are not read, by what they are.

    Raises:
        ConversionError: a tensor is stored twice, under two names.
    """

    def __init__(self, source: PartSource, architecture: Architecture, model: ModelConfig) -> None:
        self._source = source
        self._places: dict[str, _Place | _PackedPlace] = {}
        self.specs: dict[str, TensorSpec] = {}
        self.dropped: dict[str, list[str]] = {}
        renames = _aliases(architecture, model)
        stacks = {
            stacked.hf.format(layer=layer): (stacked, layer)
            for stacked in architecture.stacked
            for layer in range(model.num_layers)
        }
        prefixed = any(name.startswith(architecture.prefix) for name in source.specs)
        for key, spec in source.specs.items():
            name = renames.get(key, key)
            if not prefixed and name not in architecture.heads:
                name = architecture.prefix + name
            base = name.removesuffix(BLOCKS).removesuffix(SCALES)
            if name in stacks and _splits(spec, stacks[name][0]):
                self._unstack(key, spec, *stacks[name])
            elif base != name and base in stacks and _unpacks(source, key, stacks[base][0]):
                if name.endswith(BLOCKS):  # the scales are read with them
                    self._unpack(key.removesuffix(BLOCKS), spec, *stacks[base])
            elif drop := next((drop for drop in architecture.drops if _drops(drop, name, source.specs)), None):
                self.dropped.setdefault(drop.why, []).append(key)
            else:
                self._put(name, _Place(key), spec)

    def _unstack(self, key: str, spec: TensorSpec, stacked: Stacked, layer: int) -> None:
        experts, rows, *columns = spec.shape
        share = rows // len(stacked.parts)
        for expert in range(experts):
            for number, part in enumerate(stacked.parts):
                box = (expert, number * share, *(0 for _ in columns)), (1, share, *columns)
                name = part.format(layer=layer, expert=expert)
                self._put(name, _Place(key, box), TensorSpec((share, *columns), spec.dtype))

    def _unpack(self, key: str, blocks: TensorSpec, stacked: Stacked, layer: int) -> None:
        experts, columns, groups, _ = blocks.shape
        (part,) = stacked.parts
        for expert in range(experts):
            name, shape = part.format(layer=layer, expert=expert), (groups * GROUP, columns)
            self._put(name, _PackedPlace(key, expert), TensorSpec(shape, torch.bfloat16))

    def _put(self, name: str, place: _Place | _PackedPlace, spec: TensorSpec) -> None:
        if name in self._places:
            raise ConversionError(f"{name} is stored twice: in {self._places[name].key} and in {place.key}")
        self._places[name], self.specs[name] = place, spec

    def read(self, name: str) -> Tensor:
        """One whole tensor; of fused ones only the part that it is."""
        return self._places[name].read(self._source)


def _splits(spec: TensorSpec, stacked: Stacked) -> bool:
    """Whether the tensor has the form of fused experts; otherwise it is left to be reported as unexpected."""
    return len(spec.shape) in (2, 3) and spec.shape[1] % len(stacked.parts) == 0


def _unpacks(source: PartSource, key: str, stacked: Stacked) -> bool:
    """Whether `key` is one of two tensors that hold fused experts in MXFP4; otherwise it is left to be reported."""
    base = key.removesuffix(BLOCKS).removesuffix(SCALES)
    blocks, scales = (source.specs.get(f"{base}{end}") for end in (BLOCKS, SCALES))
    if not stacked.packed or blocks is None or scales is None or len(blocks.shape) != 4:
        return False
    bytes_only = blocks.dtype is scales.dtype is torch.uint8
    return bytes_only and blocks.shape == (*scales.shape, GROUP // 2)


def _aliases(architecture: Architecture, model: ModelConfig) -> dict[str, str]:
    return {
        alias.other.format(layer=layer): alias.hf.format(layer=layer)
        for alias in architecture.aliases
        for layer in range(model.num_layers)
    }


def _drops(drop: Drop, name: str, present: Mapping[str, TensorSpec]) -> bool:
    pattern = re.escape(drop.hf).replace(re.escape("{layer}"), r"(\d+)").replace(r"\*", ".*")
    match = re.fullmatch(pattern, name)
    return match is not None and (drop.beside is None or drop.beside.format(layer=match[1]) in present)
