"""Sparse upcycling: every routed expert starts as a copy of the dense feed-forward layer.

Komatsuzaki et al. 2022 (arXiv 2212.05055), section 3; with gating-logit normalization, Skywork-MoE (arXiv 2406.06563).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConfigError
from megatron_ext.upcycling.method import FeedForward


class Copy:
    """Experts are the dense layer; a shared expert starts silent (its output projection is zero).

    Since all experts agree, biases included, the routed output is the dense output times the sum of the selected
    experts' weights: the function is kept exactly where those sum to 1, whatever the router says.
    """

    name = "copy"

    def check(self, dense: ModelConfig, moe: ModelConfig) -> None:
        """Experts must have the dense layer's width."""
        if moe.expert_ffn_hidden_size != dense.ffn_hidden_size:
            raise ConfigError(
                f"moe_ffn_hidden_size = {moe.expert_ffn_hidden_size}: copying needs experts of the dense layer's "
                f"width, {dense.ffn_hidden_size}"
            )

    def inexact(self, moe: ModelConfig) -> str | None:
        """Weights must sum to 1: a softmax over the selected experts, or normalized, and without a scaling factor."""
        softmax_over_selected = moe.moe_router_score_function == "softmax" and not moe.moe_router_pre_softmax
        if not softmax_over_selected and not moe.normalizes_topk:
            return "moe_router_norm_topk_prob is off: the selected experts' weights do not sum to 1"
        if moe.moe_router_topk_scaling_factor not in (None, 1.0):
            return (
                f"moe_router_topk_scaling_factor = {moe.moe_router_topk_scaling_factor}: weights sum to that, not to 1"
            )
        return None

    def experts(self, ffn: FeedForward, moe: ModelConfig) -> Iterator[FeedForward]:
        """The same tensors for every expert."""
        assert moe.num_moe_experts is not None
        for _ in range(moe.num_moe_experts):
            yield ffn

    def shared(self, ffn: FeedForward, moe: ModelConfig) -> FeedForward:
        """The dense layer's neurons, repeated or cut to the shared width, with nothing written to the output yet."""
        width = moe.moe_shared_expert_intermediate_size
        assert width is not None
        neurons = torch.arange(width) % ffn.fc2.shape[1]

        def chosen(rows: Tensor) -> Tensor:
            return torch.cat([half[neurons] for half in rows.chunk(2 if moe.gated_linear_unit else 1)])

        return FeedForward(
            chosen(ffn.fc1),
            torch.zeros_like(ffn.fc2[:, neurons]),
            None if ffn.fc1_bias is None else chosen(ffn.fc1_bias),
            None if ffn.fc2_bias is None else torch.zeros_like(ffn.fc2_bias),
        )
