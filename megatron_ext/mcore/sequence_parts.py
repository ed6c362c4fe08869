"""The parts of a sequence that TP ranks have under sequence parallelism: brought together, and summed."""

from typing import Any

import torch.distributed as dist
from torch import Tensor


def gather(part: Tensor, group: Any, *, wait: bool = True) -> tuple[Tensor, Any]:
    """The parts of all ranks of `group` along the sequence, and the handle to wait for if not waited for here."""
    whole = part.new_empty(part.shape[0] * group.size(), *part.shape[1:])
    handle = dist.all_gather_into_tensor(whole, part.contiguous(), group=group, async_op=not wait)
    return whole, handle


def reduce_scatter(whole: Tensor, group: Any) -> tuple[Tensor, Any]:
    """The sum over `group` of this rank's part of the sequence, and the handle to wait for."""
    part = whole.new_empty(whole.shape[0] // group.size(), *whole.shape[1:])
    return part, dist.reduce_scatter_tensor(part, whole, group=group, async_op=True)
