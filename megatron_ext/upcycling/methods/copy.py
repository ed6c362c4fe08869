"""Sparse upcycling: every routed expert starts as a copy of the dense feed-forward layer.

Komatsuzaki et al. 2022 (arXiv 2212.05055), section 3; with gating-logit normalization, Skywork-MoE (arXiv 2406.06563).
"""

from __future__ import annotations

from typing import Literal

from megatron_ext.config import ModelConfig
from megatron_ext.config.base import config
from megatron_ext.upcycling.feed_forward import FeedForward
from megatron_ext.upcycling.methods.base import Draw, Method, require_width


@config
class Copy(Method):
    """Every expert starts as the dense feed-forward layer, a shared expert starts silent (it writes zeros).

    Since all experts agree, biases included, the routed output is the dense output times the sum of the selected
    experts' weights: the function is kept wherever that sum is known, whatever the router says.
    """

    kind: Literal["copy"] = "copy"

    def check(self, dense: ModelConfig, moe: ModelConfig) -> None:
        """Experts must have the dense layer's width."""
        require_width(moe, dense.ffn_hidden_size, "copying needs experts of the dense layer's width")

    def expert(self, number: int, ffn: FeedForward, moe: ModelConfig, draw: Draw) -> FeedForward:
        """The same tensors for every expert."""
        return ffn
