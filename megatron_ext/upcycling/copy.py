"""Sparse upcycling: every routed expert starts as a copy of the dense feed-forward layer.

Komatsuzaki et al. 2022 (arXiv 2212.05055), section 3; with gating-logit normalization, Skywork-MoE (arXiv 2406.06563).
"""

import itertools
from collections.abc import Sequence
from typing import Literal

from megatron_ext.config import ModelConfig
from megatron_ext.config.base import config
from megatron_ext.upcycling.method import Draw, Method, MoELayer, Reader, require_width, silent_shared


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

    def layer(self, sources: Sequence[Reader], moe: ModelConfig, draw: Draw) -> MoELayer:
        """The same tensors for every expert."""
        (read,) = sources
        ffn = read()
        assert moe.num_moe_experts is not None
        return MoELayer(itertools.repeat(ffn, moe.num_moe_experts), silent_shared(ffn, moe))
