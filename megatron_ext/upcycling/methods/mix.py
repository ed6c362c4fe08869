"""Branch-Train-Mix: the feed-forward layers of several dense models become the experts, the rest is averaged.

Sukhbaatar et al. 2024 (arXiv 2403.07816), section 3.2: models branched from one and trained apart, or any fine-tuned
models of one shape.
"""

from __future__ import annotations

from typing import Literal

from megatron_ext.config import ModelConfig
from megatron_ext.config.base import config
from megatron_ext.errors import ConfigError
from megatron_ext.upcycling.feed_forward import FeedForward
from megatron_ext.upcycling.methods.base import Draw, Method, require_width


@config
class Mix(Method):
    """Each source gives as many consecutive experts as the others; all else is the sources' average.

    The function is kept only where all sources are the same model.
    """

    kind: Literal["mix"] = "mix"
    source_weights: list[float] | None = None
    """Weight of each source in the average of what is not an expert; they are divided by their sum. Default: equal."""
    shared_experts: Literal["average", "silent"] = "silent"
    """Where the model has shared experts: the average of the sources' feed-forward layers, which then counts one half
    and the routed experts the other; or silent, writing zeros at first."""

    @property
    def shared_from_average(self) -> bool:
        """Where they are asked to be."""
        return self.shared_experts == "average"

    def check(self, dense: ModelConfig, moe: ModelConfig) -> None:
        """Experts, and an averaged shared expert, must have the dense layer's width."""
        require_width(moe, dense.ffn_hidden_size, "experts are whole layers of the sources")
        width = moe.moe_shared_expert_intermediate_size
        if self.shared_from_average and width != dense.ffn_hidden_size:
            raise ConfigError(
                f"shared_expert_size = {width}: with --shared-experts average it must be {dense.ffn_hidden_size}, the "
                "width of the dense layers"
            )

    def check_sources(self, sources: int, experts: int) -> None:
        """Each source must give as many experts, and have a weight where weights are given."""
        if sources < 2:
            raise ConfigError(f"sources: {sources} given; --method {self.kind} takes two or more")
        if experts % sources:
            raise ConfigError(f"num_experts = {experts}: must be a multiple of the {sources} sources")
        if self.source_weights is not None and len(self.source_weights) != sources:
            raise ConfigError(f"source_weights = {self.source_weights}: give one for each of the {sources} sources")
        if self.source_weights is not None and sum(self.source_weights) == 0:
            raise ConfigError(f"source_weights = {self.source_weights}: sum to 0")

    def changes(self, moe: ModelConfig) -> str | None:
        """The sources are different models."""
        return "experts and average are of different models"

    def weight_sum(self, moe: ModelConfig) -> float:
        """One half where a shared expert gives the other."""
        return 0.5 if self.shared_from_average else 1.0

    def shared_origin(self) -> str:
        """One half of the average where it is asked for."""
        return "half of it" if self.shared_from_average else super().shared_origin()

    def expert(self, number: int, ffn: FeedForward, moe: ModelConfig, draw: Draw) -> FeedForward:
        """The layer of the expert's source."""
        return ffn

    def shared(self, ffn: FeedForward, moe: ModelConfig, draw: Draw) -> FeedForward:
        """Half of the average, or silent."""
        return ffn.times(0.5) if self.shared_from_average else super().shared(ffn, moe, draw)
