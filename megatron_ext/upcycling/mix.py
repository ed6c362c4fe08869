"""Branch-Train-Mix: the feed-forward layers of several dense models become the experts, the rest is averaged.

Sukhbaatar et al. 2024 (arXiv 2403.07816), section 3.2: models branched from one and trained apart, or any fine-tuned
models of one shape.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Literal

from torch import Tensor

from megatron_ext.config import ModelConfig
from megatron_ext.config.base import config
from megatron_ext.errors import ConfigError
from megatron_ext.merging.merge import Linear, Versions
from megatron_ext.upcycling.feed_forward import FeedForward
from megatron_ext.upcycling.method import Draw, Method, MoELayer, Reader, require_width, silent_shared


@config
class Mix(Method):
    """Each source gives as many consecutive experts as the others; all else is the sources' average.

    The function is kept only where all sources are the same model.
    """

    kind: Literal["mix"] = "mix"
    source_weights: list[float] | None = None
    """Weight of each source in the average of what is not an expert; they are divided by their sum. Default: equal."""
    shared: Literal["average", "silent"] = "silent"
    """Where the model has shared experts: the average of the sources' feed-forward layers, which then counts one half
    and the routed experts the other; or silent, writing zeros at first."""
    sources_at_least = 2
    sources_at_most = None

    def check(self, dense: ModelConfig, moe: ModelConfig) -> None:
        """Experts, and an averaged shared expert, must have the dense layer's width."""
        require_width(moe, dense.ffn_hidden_size, "experts are whole layers of the sources")
        width = moe.moe_shared_expert_intermediate_size
        if self.shared == "average" and width not in (None, dense.ffn_hidden_size):
            raise ConfigError(
                f"shared_expert_size = {width}: an average of dense layers has their width, {dense.ffn_hidden_size}"
            )

    def changes(self, moe: ModelConfig) -> str | None:
        """The sources are different models."""
        return "experts and average are of different models"

    def weight_sum(self, moe: ModelConfig) -> float:
        """One half where a shared expert gives the other."""
        return 0.5 if self._averages_shared(moe) else 1.0

    def _averages_shared(self, moe: ModelConfig) -> bool:
        return self.shared == "average" and moe.moe_shared_expert_intermediate_size is not None

    def average(self, versions: Versions) -> Tensor:
        """The weighted mean of a tensor that is not an expert's."""
        return Linear(weights=self.source_weights).merge("", versions, None, 0)

    def layer(self, sources: Sequence[Reader], moe: ModelConfig, draw: Draw) -> MoELayer:
        """Experts read one source at a time."""
        assert moe.num_moe_experts is not None
        if moe.num_moe_experts % len(sources):
            raise ConfigError(f"num_moe_experts = {moe.num_moe_experts}: must be a multiple of {len(sources)} sources")
        if self._averages_shared(moe):
            shared: FeedForward | None = self._averaged(sources).times(0.5)
        else:
            shared = silent_shared(sources[0](), moe)
        return MoELayer(self._experts(sources, moe.num_moe_experts // len(sources)), shared)

    def _experts(self, sources: Sequence[Reader], each: int) -> Iterator[FeedForward]:
        for read in sources:
            yield from itertools.repeat(read(), each)

    def _averaged(self, sources: Sequence[Reader]) -> FeedForward:
        networks = [functools.partial(_part, read) for read in sources]
        first = sources[0]()
        parts = {
            field.name: self.average([functools.partial(network, field.name) for network in networks])
            for field in fields(FeedForward)
            if getattr(first, field.name) is not None
        }
        return FeedForward(**parts)


def _part(read: Reader, name: str) -> Tensor:
    tensor: Tensor = getattr(read(), name)
    return tensor
