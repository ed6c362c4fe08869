"""A weighted sum of tensors that come one at a time."""

import torch
from torch import Tensor

_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype to add up numbers of `dtype` in: equal models then average to themselves, bit for bit."""
    return _WIDER.get(dtype, dtype)


class WeightedSum:
    """Holds one tensor of the wider dtype, however many are added."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._dtype = torch.float32

    def add(self, weight: float, tensor: Tensor) -> None:
        """Add `weight` times `tensor`."""
        if self._total is None:
            self._dtype = tensor.dtype
            self._total = torch.zeros(tensor.shape, dtype=wider(tensor.dtype))
        self._total.add_(tensor.to(self._total.dtype), alpha=weight)

    def result(self) -> Tensor:
        """The sum in the dtype of the first tensor."""
        assert self._total is not None, "nothing was added"
        return self._total.to(self._dtype)
