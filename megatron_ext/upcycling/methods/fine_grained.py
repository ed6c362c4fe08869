"""Fine-grained upcycling into virtual groups: each expert starts as a part of the dense layer's neurons.

He et al. 2024 (NVIDIA, arXiv 2410.07524), sections 3.1 to 3.3.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from megatron_ext.config import ModelConfig
from megatron_ext.config.base import config
from megatron_ext.errors import ConfigError
from megatron_ext.upcycling.feed_forward import FeedForward
from megatron_ext.upcycling.methods.base import Draw, Method, require_groups, require_width

if TYPE_CHECKING:
    import torch


@config
class FineGrained(Method):
    """The dense layer is cut into `granularity` parts, which repeat as the experts; a shared expert starts silent.

    A set of experts that together are the dense layer shares one row of the router: their logits are equal, so top-k
    of a multiple of `granularity` chooses whole sets, and in each set all weights are equal. With weights that sum to
    `granularity` every part then counts once, and the function is kept, whatever the router says.
    """

    kind: Literal["fine_grained"] = "fine_grained"
    granularity: int = Field(default=8, ge=2)
    """Parts that the dense layer is cut into."""
    scale: Literal["exact", "paper"] = "exact"
    """exact: the router's scaling factor makes up for the parts. paper: larger weights instead, and a softmax over all
    experts; the function is kept in expectation only."""

    def adjust(self, moe: ModelConfig, dense: ModelConfig) -> ModelConfig:
        """Experts as wide as a part, and the scaling factor or the softmax that the mode needs."""
        changes: dict[str, Any] = {}
        if moe.moe_ffn_hidden_size is None and dense.ffn_hidden_size % self.granularity == 0:
            changes["moe_ffn_hidden_size"] = dense.ffn_hidden_size // self.granularity
        if self.scale == "paper":
            changes["moe_router_pre_softmax"] = True
        elif moe.moe_router_topk_scaling_factor is None:
            changes["moe_router_topk_scaling_factor"] = float(self.granularity)
        return replace(moe, **changes)

    def check(self, dense: ModelConfig, moe: ModelConfig) -> None:
        """Parts must be equal, and experts and top-k whole sets of them."""
        if dense.ffn_hidden_size % self.granularity:
            raise ConfigError(
                f"granularity = {self.granularity}: the dense layer's width, {dense.ffn_hidden_size}, is no multiple "
                "of it"
            )
        require_width(moe, dense.ffn_hidden_size // self.granularity, "experts have the width of a part")
        require_groups(moe, self.granularity, "layer")
        if self.scale == "paper" and (moe.moe_router_score_function != "softmax" or moe.normalizes_topk):
            raise ConfigError("scale = paper: is for a softmax over all experts, not normalized; set scale: exact")
        if self.scale == "paper" and moe.moe_gating_normalization is not None:
            raise ConfigError(
                "scale = paper: its weights are right for probabilities that are about even, and a normalized gate has "
                "others; pass --no-gating-normalization"
            )

    def group_size(self, moe: ModelConfig) -> int:
        """The experts that together are the dense layer."""
        return self.granularity

    def weight_sum(self, moe: ModelConfig) -> float:
        """Each part counts once."""
        return float(self.granularity) if self.scale == "exact" else 1.0

    def factors(self, moe: ModelConfig) -> list[float]:
        """Each part has its share of the output bias."""
        return [*super().factors(moe), *([1 / self.granularity] if moe.add_bias_linear else [])]

    def changes(self, moe: ModelConfig) -> str | None:
        """The paper's weights are right for evenly distributed probabilities."""
        if self.scale == "paper":
            return "scale: paper keeps the function only where all experts' probabilities are equal"
        return group_limit(moe)

    def expert(self, number: int, ffn: FeedForward, moe: ModelConfig, draw: Draw) -> FeedForward:
        """Part 0, part 1, ..., and the same again until all experts are filled."""
        import torch

        whole = self._enlarged(ffn, moe) if self.scale == "paper" else ffn
        return shard(whole, torch.arange(ffn.width), number, self.granularity)

    def _enlarged(self, ffn: FeedForward, moe: ModelConfig) -> FeedForward:
        """Weights scaled as in section 3.3: experts are chosen with 1 / E each, so the output is T / (E G) of a part.

        With G parts, E experts and T chosen the factor is (E G / T) for the product of all matrices of a neuron,
        its root for each: the cube root for gated layers (E counts experts, the paper's E sets of parts).
        """
        assert moe.num_moe_experts is not None
        product = moe.num_moe_experts * self.granularity / moe.moe_router_topk
        factor = product ** (1 / (ffn.halves + 1))
        bias = None if ffn.fc1_bias is None else ffn.fc1_bias * factor
        larger = replace(ffn, fc1=ffn.fc1 * factor, fc2=ffn.fc2 * factor, fc1_bias=bias)
        return larger.with_bias_times(product)


def shard(ffn: FeedForward, order: torch.Tensor, number: int, count: int) -> FeedForward:
    """Part `number` modulo `count` of the neurons in `order`, with its share of the output bias."""
    return ffn.neurons(order.chunk(count)[number % count]).with_bias_times(1 / count)


def group_limit(moe: ModelConfig) -> str | None:
    """Why sets of experts with equal logits may be torn apart."""
    if moe.moe_router_num_groups is not None:
        return "group-limited routing may choose among groups that hold parts of one set"
    return None
