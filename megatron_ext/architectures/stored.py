"""How else the tensors of an architecture may be stored: fused, under older names, with masks beside them.

Rules speak of one set of Hugging Face names. `unstacked` presents whatever a directory holds under these names.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from megatron_ext.checkpoint.boxes import Shape
from megatron_ext.checkpoint.tensors import TensorSpec
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConversionError

if TYPE_CHECKING:
    from megatron_ext.architectures.base import Architecture


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
class Stacked:
    """The experts of a layer as one tensor [experts, rows, columns], as newer writers may have them."""

    hf: str
    """Its name, with the hole `{layer}`."""
    parts: tuple[str, ...]
    """Names of an expert's tensors, with `{layer}` and `{expert}`: they share its rows equally, in this order."""


@dataclass(frozen=True)
class Alias:
    """Another name that files have for a tensor. Both may have the hole `{layer}`."""

    hf: str
    """The name that rules have."""
    other: str


@dataclass(frozen=True)
class Drop:
    """Tensors that only Hugging Face files have and that no logits depend on; they are not read."""

    hf: str
    """Their name, with the hole `{layer}` for any number, and `*` for anything at the end."""
    why: str
    beside: str | None = None
    """Only in layers that have this tensor too."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: the whole of `key`, or a part of it."""

    key: str
    box: tuple[Shape, Shape] | None = None


class UnstackedSource:
    """The tensors of `source` under the names that an architecture's rules have.

    What it does not know keeps its name, so that whoever accounts for the tensors reports it.
    """

    def __init__(self, source: PartSource, architecture: "Architecture", model: ModelConfig) -> None:
        self._source = source
        self._places: dict[str, _Place] = {}
        self.specs: dict[str, TensorSpec] = {}
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
            if name in stacks and _splits(spec, stacks[name][0]):
                self._unstack(key, spec, *stacks[name])
            elif not any(_drops(drop, name, source.specs) for drop in architecture.drops):
                self._put(name, _Place(key), spec)

    def _unstack(self, key: str, spec: TensorSpec, stacked: Stacked, layer: int) -> None:
        experts, rows, columns = spec.shape
        share = rows // len(stacked.parts)
        for expert in range(experts):
            for number, part in enumerate(stacked.parts):
                box = (expert, number * share, 0), (1, share, columns)
                name = part.format(layer=layer, expert=expert)
                self._put(name, _Place(key, box), TensorSpec((share, columns), spec.dtype))

    def _put(self, name: str, place: _Place, spec: TensorSpec) -> None:
        if name in self._places:
            raise ConversionError(f"{name} is stored twice: in {self._places[name].key} and in {place.key}")
        self._places[name], self.specs[name] = place, spec

    def read(self, name: str) -> Tensor:
        """One whole tensor; of fused ones only the part that it is."""
        place = self._places[name]
        if place.box is None:
            return self._source.read(place.key)
        return self._source.read_box(place.key, *place.box).squeeze(0)


def unstacked(source: PartSource, architecture: "Architecture", model: ModelConfig) -> UnstackedSource:
    """A Hugging Face directory's tensors under the names that the rules of `architecture` have, read as lazily.

    Raises:
        ConversionError: one of them is stored twice, under two names.
    """
    return UnstackedSource(source, architecture, model)


def _splits(spec: TensorSpec, stacked: Stacked) -> bool:
    """Whether the tensor has the form of fused experts; otherwise it is left to be reported as unexpected."""
    return len(spec.shape) == 3 and spec.shape[1] % len(stacked.parts) == 0


def _aliases(architecture: "Architecture", model: ModelConfig) -> dict[str, str]:
    return {
        alias.other.format(layer=layer): alias.hf.format(layer=layer)
        for alias in architecture.aliases
        for layer in range(model.num_layers)
    }


def _drops(drop: Drop, name: str, present: Mapping[str, TensorSpec]) -> bool:
    pattern = re.escape(drop.hf).replace(re.escape("{layer}"), r"(\d+)").replace(r"\*", ".*")
    match = re.fullmatch(pattern, name)
    return match is not None and (drop.beside is None or drop.beside.format(layer=match[1]) in present)
