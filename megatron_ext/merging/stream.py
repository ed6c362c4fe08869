"""Several models of one shape as one stream of tensors, merged as they are read."""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from megatron_ext.checkpoint.tensors import TensorSource, TensorSpec
from megatron_ext.merging.merge import Merge


class Merged:
    """A source whose tensors are merged from those of others, which are read one after the other."""

    def __init__(
        self, merge: Merge, sources: Sequence[TensorSource], *, base: TensorSource | None = None, seed: int = 0
    ) -> None:
        self._merge, self._sources, self._base, self._seed = merge, sources, base, seed
        self.specs: Mapping[str, TensorSpec] = (base or sources[0]).specs

    def read(self, name: str) -> Tensor:
        """One whole merged tensor."""
        base = None if self._base is None else self._base.read(name)
        return self._merge.merge(name, [partial(source.read, name) for source in self._sources], base, self._seed)
