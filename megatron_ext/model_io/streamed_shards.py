"""Reads shards of a model as Megatron stores it out of a stream of whole tensors: a Hugging Face directory as it is."""

from torch import Tensor

from megatron_ext.canonical.catalogue import Shape
from megatron_ext.canonical.naming import StorageLocation, storage_plan
from megatron_ext.checkpoint.streams import TensorSource


class StreamedShards:
    """The tensors of `source` under the keys of a Megatron checkpoint, each made when it is read.

    A tensor is read whole, whatever part of it is asked for; the latest is kept, since parts are asked for in order.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.tensors: dict[str, Shape] = {}
        self._names: dict[str, dict[Shape, str]] = {}
        plan: dict[str, tuple[StorageLocation, Shape]] = storage_plan(
            {name: spec.shape for name, spec in source.specs.items()}
        )
        for name, (place, shape) in plan.items():
            self.tensors[place.key] = shape
            self._names.setdefault(place.key, {})[place.index] = name
        self._latest: tuple[str, Tensor] | None = None

    def shape(self, key: str) -> Shape:
        """Global shape of `key`."""
        return self.tensors[key]

    def read_into(self, key: str, offset: Shape, target: Tensor) -> None:
        """Fill `target` with the shard of `key` at `offset`, converting the dtype where it differs."""
        for stacked, name in self._names[key].items():
            leading = len(stacked)
            at = tuple(index - start for index, start in zip(stacked, offset[:leading], strict=True))
            if all(0 <= index < size for index, size in zip(at, target.shape[:leading], strict=True)):
                rest = zip(offset[leading:], target.shape[leading:], strict=True)
                target[at].copy_(self._read(name)[tuple(slice(start, start + size) for start, size in rest)])

    def _read(self, name: str) -> Tensor:
        if self._latest is None or self._latest[0] != name:
            self._latest = None  # one at a time
            self._latest = name, self._source.read(name)
        return self._latest[1]
