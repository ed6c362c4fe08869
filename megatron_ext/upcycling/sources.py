"""The dense models that an upcycling reads, as one stream: each by its number, and their average."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_ext.checkpoint.streams import TensorSource, TensorSpec

AVERAGE = "average"
"""Prefix of what is read from the average of all sources."""
_KEPT = 4
"""Tensors kept: those of the feed-forward layer that its experts are being made of, two matrices and two biases."""


class Sources:
    """Tensor `NAME` of source i as `i/NAME`, of the average of all as `average/NAME`.

    All experts of a layer are made of the same few tensors, one task each: the latest are kept, so that each is read
    once.
    """

    def __init__(self, sources: Sequence[TensorSource], average: TensorSource) -> None:
        self._parts = {**{str(number): source for number, source in enumerate(sources)}, AVERAGE: average}
        self.specs: Mapping[str, TensorSpec] = {
            f"{prefix}/{name}": spec for prefix, source in self._parts.items() for name, spec in source.specs.items()
        }
        self._latest: OrderedDict[str, Tensor] = OrderedDict()
        self._one_reads = threading.Lock()

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        prefix, _, own_name = name.partition("/")
        if ".mlp.linear_fc" not in own_name:
            return self._parts[prefix].read(own_name)
        with self._one_reads:
            if name not in self._latest:
                self._latest[name] = self._parts[prefix].read(own_name)
                while len(self._latest) > _KEPT:
                    self._latest.popitem(last=False)
            self._latest.move_to_end(name)
            return self._latest[name]
