"""Says which tensors of a model hold what is no number, while they are read for something else."""

import threading
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from megatron_ext.checkpoint.streams import TensorSource, TensorSpec


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are numbers: neither NaN nor infinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    # One pass without a tensor in between, unlike isfinite; NaN is larger and smaller than everything to it.
    return bool(torch.stack(tensor.detach().aminmax()).isfinite().all())


def describe(names: Iterable[str], total: int) -> str:
    """The tensors `names`, of `total`, in words."""
    names = sorted(names)
    few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names):,} of {total:,} tensors hold NaN or infinite values ({few})"


class WatchedSource:
    """A source that remembers which tensors it gave were not finite; to be read by several threads."""

    def __init__(self, source: TensorSource) -> None:
        self._source, self._lock = source, threading.Lock()
        self.not_finite: set[str] = set()

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Of the source."""
        return self._source.specs

    def read(self, name: str) -> Tensor:
        """The source's tensor."""
        tensor = self._source.read(name)
        if not is_finite(tensor):
            with self._lock:
                self.not_finite.add(name)
        return tensor
