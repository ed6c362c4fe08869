"""Shared and routed split: some neurons of the dense layer become the shared expert, the rest fine-grained experts.

The shape of DeepSeekMoE (Dai et al. 2024, arXiv 2401.06066, section 3) made from a dense model, with the virtual groups
of He et al. 2024 (arXiv 2410.07524) so that the function is kept.
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
from megatron_ext.upcycling.methods.fine_grained import group_limit, shard

if TYPE_CHECKING:
    import torch


@config
class SharedRouted(Method):
    """As many neurons as the shared expert is wide go there; the others are cut into `granularity` parts.

    Parts repeat as the routed experts and are chosen in whole sets (fine_grained.py). Every neuron then counts once,
    and the function is kept, whatever the router says.
    """

    kind: Literal["shared_routed"] = "shared_routed"
    granularity: int = Field(default=4, ge=1)
    """Parts that the neurons of the routed experts are cut into."""
    shuffle: bool = True
    """Choose at random which neurons are shared and which part the others go to. False: in their order."""

    def adjust(self, moe: ModelConfig, dense: ModelConfig) -> ModelConfig:
        """Experts as wide as a part, and weights that sum to the number of parts."""
        changes: dict[str, Any] = {}
        routed = dense.ffn_hidden_size - (moe.moe_shared_expert_intermediate_size or 0)
        if moe.moe_ffn_hidden_size is None and routed > 0 and routed % self.granularity == 0:
            changes["moe_ffn_hidden_size"] = routed // self.granularity
        if moe.moe_router_topk_scaling_factor is None and self.granularity > 1:
            changes["moe_router_topk_scaling_factor"] = float(self.granularity)
        return replace(moe, **changes)

    def check(self, dense: ModelConfig, moe: ModelConfig) -> None:
        """There must be a shared expert, equal parts, and experts and top-k in whole sets of them."""
        shared = moe.moe_shared_expert_intermediate_size
        if shared is None or shared >= dense.ffn_hidden_size:
            raise ConfigError(
                f"shared_expert_size = {shared}: must be set, and smaller than the dense layer, {dense.ffn_hidden_size}"
            )
        routed = dense.ffn_hidden_size - shared
        if routed % self.granularity:
            raise ConfigError(
                f"granularity = {self.granularity}: the {routed} neurons beside the shared expert are no multiple of it"
            )
        require_width(moe, routed // self.granularity, "experts have the width of a part")
        require_groups(moe, self.granularity, "rest of a layer")

    def group_size(self, moe: ModelConfig) -> int:
        """The experts that together are the neurons that are not shared."""
        return self.granularity

    def weight_sum(self, moe: ModelConfig) -> float:
        """Each part counts once."""
        return float(self.granularity)

    def changes(self, moe: ModelConfig) -> str | None:
        """Nothing, unless sets of experts are torn apart."""
        return group_limit(moe)

    def expert(self, number: int, ffn: FeedForward, moe: ModelConfig, draw: Draw) -> FeedForward:
        """A part of the neurons that are not shared."""
        order = self._order(ffn, draw)[moe.moe_shared_expert_intermediate_size :]
        return shard(ffn.with_bias_times(0.0), order, number, self.granularity)

    def shared_origin(self) -> str:
        """Some of its neurons."""
        return f"neurons chosen {'at random' if self.shuffle else 'in their order'}"

    def shared(self, ffn: FeedForward, moe: ModelConfig, draw: Draw) -> FeedForward:
        """The shared neurons, and the output bias, since every token passes through here."""
        return ffn.neurons(self._order(ffn, draw)[: moe.moe_shared_expert_intermediate_size])

    def _order(self, ffn: FeedForward, draw: Draw) -> torch.Tensor:
        import torch

        return draw.permutation("neurons", ffn.width) if self.shuffle else torch.arange(ffn.width)
