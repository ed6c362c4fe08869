"""What an upcycling method is: a function from the feed-forward layers of dense models to the parts of a MoE layer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_ext.canonical.seeds import seed_from_name
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConfigError
from megatron_ext.upcycling.feed_forward import FeedForward

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Draw:
    """Random numbers of one layer, which depend on the seed and on names alone: not on layout, workers or order."""

    seed: int
    layer: str
    """Canonical name of the layer's feed-forward part."""

    def generator(self, name: str) -> torch.Generator:
        """A generator for what is called `name` in this layer."""
        import torch

        return torch.Generator().manual_seed(seed_from_name(self.seed, f"{self.layer}.{name}"))

    def permutation(self, name: str, count: int) -> torch.Tensor:
        """The numbers below `count` in random order."""
        import torch

        return torch.randperm(count, generator=self.generator(name))


class Method(ABC):
    """One way to turn dense models into a MoE model. Its fields are its options."""

    kind: str
    source_weights: list[float] | None = None
    """Weight of each of several models in their average."""

    @property
    def shared_from_average(self) -> bool:
        """Whether the shared experts are made of the average of several models, too."""
        return False

    def check_sources(self, sources: int, experts: int) -> None:
        """Raise ConfigError where this method cannot make `experts` experts of so many models."""
        if sources > 1:
            raise ConfigError(f"sources: {sources} given; --method {self.kind} takes one")

    def adjust(self, moe: ModelConfig, dense: ModelConfig) -> ModelConfig:
        """The model with what this method implies of it, where nothing else was asked for."""
        return moe

    @abstractmethod
    def check(self, dense: ModelConfig, moe: ModelConfig) -> None:
        """Raise ConfigError where this method cannot make `moe` out of models like `dense`."""

    @abstractmethod
    def expert(self, number: int, ffn: FeedForward, moe: ModelConfig, draw: Draw) -> FeedForward:
        """Make routed expert `number` of a layer out of the layer's dense network."""

    def shared_origin(self) -> str:
        """What `shared` does with the dense network, in words."""
        return "repeated or cut to its width; linear_fc2 is zero at first"

    def shared(self, ffn: FeedForward, moe: ModelConfig, draw: Draw) -> FeedForward:
        """Make the shared experts: here the dense layer's neurons, repeated or cut, that write nothing at first."""
        import torch

        width = moe.moe_shared_expert_intermediate_size
        assert width is not None
        return ffn.neurons(torch.arange(width) % ffn.width).times(0.0)

    def group_size(self, moe: ModelConfig) -> int:
        """Consecutive experts that share a row of the router, and so are always chosen together."""
        return 1

    def weight_sum(self, moe: ModelConfig) -> float:
        """What the selected experts' weights must sum to, for the output to have the dense one's scale."""
        return 1.0

    def changes(self, moe: ModelConfig) -> str | None:
        """Why this method changes the function, whatever the router does; None if it does not."""
        return None

    def inexact(self, moe: ModelConfig, dtype: torch.dtype | None = None) -> str | None:
        """Why the MoE model will not compute what the dense one does; None if it will, up to the rounding of fp32.

        Args:
            dtype: of the MoE model's weights; fp32 by default.
        """
        import torch

        if (reason := self.changes(moe) or _weights_vary(moe)) is not None:
            return reason
        for factor in self.factors(moe):
            if dtype not in (None, torch.float32) and not _is_power_of_two(factor):
                return f"a factor {factor:.4g} goes into the experts' output weights, which rounds them in {dtype}"
        return None

    def factors(self, moe: ModelConfig) -> list[float]:
        """What output weights or biases are multiplied by."""
        return [self.folded(moe)]

    def folded(self, moe: ModelConfig) -> float:
        """The factor on the experts' output weights that makes up for what the router's weights sum to."""
        return self.weight_sum(moe) / (moe.moe_router_topk_scaling_factor or 1.0)


def _weights_vary(moe: ModelConfig) -> str | None:
    """Why the selected experts' weights do not sum to a constant."""
    softmax_over_selected = moe.moe_router_score_function == "softmax" and not moe.moe_router_pre_softmax
    if softmax_over_selected or moe.normalizes_topk:
        return None
    return "moe_router_norm_topk_prob is off: the selected experts' weights do not sum to a constant"


def _is_power_of_two(factor: float) -> bool:
    return math.frexp(factor)[0] == 0.5


def require_width(moe: ModelConfig, expected: int, why: str) -> None:
    """Raise ConfigError unless an expert is `expected` wide."""
    if moe.expert_ffn_hidden_size != expected:
        raise ConfigError(f"moe_ffn_hidden_size = {moe.expert_ffn_hidden_size}: {why}, {expected}")


def require_groups(moe: ModelConfig, shards: int, shard: str) -> None:
    """Raise ConfigError unless experts and top-k are whole sets of `shards`."""
    assert moe.num_moe_experts is not None
    for name, value in (("num_moe_experts", moe.num_moe_experts), ("moe_router_topk", moe.moe_router_topk)):
        if value % shards:
            raise ConfigError(
                f"{name} = {value}: each {shard} is cut into {shards} parts, which are chosen together; "
                f"it must be a multiple of {shards}"
            )
    if moe.num_moe_experts == shards:
        raise ConfigError(f"num_moe_experts = {shards}: one set of parts leaves the router nothing to choose")
