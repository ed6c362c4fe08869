"""A feed-forward network as methods take it apart: by its neurons, the units between its two matrices."""

from __future__ import annotations

#   F neurons, H hidden
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FeedForward:
    """`fc2 @ (activation(gate @ x) * (up @ x))`, or not gated `fc2 @ activation(fc1 @ x)`.

    Neuron i is row i of each half of fc1 and column i of fc2. The output is a sum over neurons, so their order does not
    matter and any split of them is a split of the output.
    """

    fc1: Tensor
    """[2F, H], gate rows above up rows; [F, H] if not gated."""
    fc2: Tensor
    """[H, F]"""
    fc1_bias: Tensor | None = None
    """[2F] or [F], added to what fc1 gives."""
    fc2_bias: Tensor | None = None
    """[H], added to the output."""

    @property
    def width(self) -> int:
        """Number of neurons, F."""
        return self.fc2.shape[1]

    @property
    def halves(self) -> int:
        """Matrices in fc1: 2 if gated."""
        return self.fc1.shape[0] // self.width

    def neurons(self, chosen: Tensor) -> FeedForward:
        """The network of these neurons (indices [f], repeats allowed), with the whole output bias."""
        import torch

        def rows(stacked: Tensor) -> Tensor:

            return torch.cat([half[chosen] for half in stacked.chunk(self.halves)])

        bias = None if self.fc1_bias is None else rows(self.fc1_bias)
        return FeedForward(rows(self.fc1), self.fc2[:, chosen], bias, self.fc2_bias)

    def times(self, factor: float) -> FeedForward:
        """The network whose output is `factor` times this one's."""
        if factor == 1.0:
            return self
        return FeedForward(self.fc1, self.fc2 * factor, self.fc1_bias, _times(self.fc2_bias, factor))

    def with_bias_times(self, factor: float) -> FeedForward:
        """The same with `factor` times the output bias."""
        return FeedForward(self.fc1, self.fc2, self.fc1_bias, _times(self.fc2_bias, factor))

    def changed(self, change: Callable[[str, Tensor, int], None]) -> FeedForward:
        """A copy whose matrices and biases `change(name, matrix, dim)` changes in place, the output bias excepted.

        Neurons lie along `dim` of each, and each has a name of its own: `gate`, `up` (`fc1` if not gated), `down`, and
        the same with `_bias`. The output bias belongs to no neuron.
        """
        names = ("gate", "up") if self.halves == 2 else ("fc1",)

        def rows(stacked: Tensor, suffix: str = "") -> Tensor:
            copy = stacked.clone()
            for name, half in zip(names, copy.chunk(self.halves), strict=True):
                change(name + suffix, half, 0)
            return copy

        fc1, fc2 = rows(self.fc1), self.fc2.clone()
        change("down", fc2, 1)
        bias = None if self.fc1_bias is None else rows(self.fc1_bias, "_bias")
        return FeedForward(fc1, fc2, bias, self.fc2_bias)


def _times(bias: Tensor | None, factor: float) -> Tensor | None:
    return None if bias is None else bias * factor
