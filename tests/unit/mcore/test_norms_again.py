"""Norms that are computed again: the same bits, whoever reads them. Their memory: planning/test_peak_memory.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.mcore.norms_again import computed_again


class Norm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.rms_norm(x, (8,), self.weight)


def test_readers_get_the_same_bits() -> None:
    norm, generator = Norm(), torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, generator=generator, requires_grad=True)
    first, second = (torch.randn(5, 8, generator=generator, requires_grad=True) for _ in range(2))

    def block() -> Tensor:
        normed = norm(x)
        # One reader of the whole, one of a transposed view of a part, one of neither; what is kept of x is x.
        return x.sum() * F.linear(normed, first).sum() + (second @ normed[2:].t()).square().sum() + normed.exp().sum()

    expected = torch.autograd.grad(block(), (x, norm.weight, first, second))
    assert norm.calls == 1
    with computed_again(norm):
        loss = block()
    found = torch.autograd.grad(loss, (x, norm.weight, first, second))
    assert norm.calls == 2 + 2  # once more for each product; the exponential keeps its own output
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not norm._forward_hooks
