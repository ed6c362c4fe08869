"""Several models of one shape as one stream of tensors, merged as they are read."""

import threading
from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from megatron_ext.checkpoint.tensors import TensorSource, TensorSpec
from megatron_ext.merging.merge import Merge


class Merged:
    """A source whose tensors are merged from those of others, which are read one after the other.

    One tensor is merged at a time, whatever the number of threads that ask: it takes several times its own memory.
    """

    def __init__(
        self, merge: Merge, sources: Sequence[TensorSource], *, base: TensorSource | None = None, seed: int = 0
    ) -> None:
        self._merge, self._sources, self._base, self._seed = merge, sources, base, seed
        self.specs: Mapping[str, TensorSpec] = (base or sources[0]).specs
        self._one_merges = threading.Lock()

    def read(self, name: str) -> Tensor:
        """One whole merged tensor."""
        versions = [partial(source.read, name) for source in self._sources]
        with self._one_merges:
            base = None if self._base is None else self._base.read(name)
            return self._merge.merge(name, versions, base, self._seed)
