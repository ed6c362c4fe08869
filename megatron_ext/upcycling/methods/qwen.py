"""Qwen's upcycling: the dense layer is repeated, shuffled along its neurons, cut into experts, and partly drawn anew.

Qwen2-57B-A14B (Yang et al. 2024, arXiv 2407.10671, section 2.2.2). The report does not say what is drawn anew (whole
neurons or single weights) nor from what; here it is whole neurons, from the distribution of initial weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from megatron_ext.config import ModelConfig
from megatron_ext.config.base import config
from megatron_ext.upcycling.feed_forward import FeedForward
from megatron_ext.upcycling.methods.base import Draw
from megatron_ext.upcycling.methods.drop import PartlyNew

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@config
class Shuffle(PartlyNew):
    """Experts of any width are cut from shuffled copies of the dense layer, and a share of each is drawn anew.

    A shared expert starts silent.
    """

    kind: Literal["qwen"] = "qwen"
    ratio: float = Field(default=0.5, ge=0, le=1)
    """Share of an expert's neurons that is drawn anew."""
    shared_indices: bool = True
    """The same neurons in all matrices of an expert. False: other ones in each matrix."""

    def changes(self, moe: ModelConfig) -> str | None:
        """Always: a token sees some neurons twice and others not at all."""
        return "each expert has neurons of its own choice, of which a share is new"

    def check(self, dense: ModelConfig, moe: ModelConfig) -> None:
        """Any width will do."""

    def kept(self, number: int, ffn: FeedForward, moe: ModelConfig, draw: Draw) -> FeedForward:
        """The next neurons of all shuffled copies, one after the other."""
        import torch

        width = moe.expert_ffn_hidden_size
        start = number * width
        first, last = start // ffn.width, (start + width - 1) // ffn.width
        copies = [draw.permutation(f"copy.{copy}", ffn.width) for copy in range(first, last + 1)]
        return ffn.neurons(torch.cat(copies)[start - first * ffn.width :][:width])

    def replacement(self, weights: Tensor, moe: ModelConfig, generator: torch.Generator) -> Tensor:
        """Normal with the standard deviation of initial weights; biases start at zero."""
        import torch

        from megatron_ext.upcycling.normal import normal_like

        if weights.dim() == 1:
            return torch.zeros_like(weights)
        return normal_like(weights, 0.0, moe.init_method_std, generator)
