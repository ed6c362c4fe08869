"""What an upcycling method is: a function from one dense feed-forward layer to the parts of a MoE layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_ext.config import ModelConfig


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network: `fc2 @ (activation(gate @ x) * (up @ x))`, or not gated `fc2 @ activation(fc1 @ x)`."""

    fc1: Tensor
    """[2F, H], gate rows above up rows; [F, H] if not gated."""
    fc2: Tensor
    """[H, F]"""
    fc1_bias: Tensor | None = None
    """[2F] or [F], added to what fc1 gives."""
    fc2_bias: Tensor | None = None
    """[H], added to the output."""


class Method(Protocol):
    """One way to turn a dense model into a MoE model."""

    name: str

    def check(self, dense: ModelConfig, moe: ModelConfig) -> None:
        """Raise ConfigError where this method cannot make `moe` out of `dense`."""

    def inexact(self, moe: ModelConfig) -> str | None:
        """Why the MoE model will not compute what the dense one does; None if it will, up to rounding."""

    def experts(self, ffn: FeedForward, moe: ModelConfig) -> Iterator[FeedForward]:
        """The routed experts made of a layer's `ffn`, in order."""

    def shared(self, ffn: FeedForward, moe: ModelConfig) -> FeedForward:
        """The shared experts made of a layer's `ffn`; called only where the model has them."""
