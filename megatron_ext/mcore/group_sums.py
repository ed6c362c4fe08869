"""Sums over a process group inside a computation, of a tensor or of its gradient.

megatron-core has the same pair, but returns a tensor that is not contiguous unsummed, silently (core_guard.py).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _SumOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.group), None


def sum_over_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of every rank's `x`, for a use whose gradient every rank computes in full."""
    return x if group.size() == 1 else _Sum.apply(x, group)


def sum_gradient_over_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`x` itself, the same on every rank, for uses that give each rank a part of its gradient."""
    return x if group.size() == 1 else _SumOfGradients.apply(x, group)
