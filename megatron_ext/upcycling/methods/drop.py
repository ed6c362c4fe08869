"""Drop-Upcycling: copies of the dense layer in which each expert has a share of its neurons drawn anew.

Nakamura et al. 2025 (arXiv 2502.19261), section 3.2, and the code released with it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from megatron_ext.config import ModelConfig
from megatron_ext.config.base import config
from megatron_ext.errors import ConfigError
from megatron_ext.upcycling.feed_forward import FeedForward
from megatron_ext.upcycling.methods.base import Draw, Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class PartlyNew(Method):
    """Experts that are the dense layer but for some neurons, other ones in each expert."""

    ratio: float
    """Share of an expert's neurons that changes."""
    shared_indices: bool
    """The same neurons in all matrices of an expert."""

    def check(self, dense: ModelConfig, moe: ModelConfig) -> None:
        """Experts may be narrower than the dense layer: each then has neurons of its own choice."""
        if moe.expert_ffn_hidden_size > dense.ffn_hidden_size:
            raise ConfigError(
                f"moe_ffn_hidden_size = {moe.expert_ffn_hidden_size}: experts cannot be wider than the dense layer, "
                f"{dense.ffn_hidden_size}"
            )

    def expert(self, number: int, ffn: FeedForward, moe: ModelConfig, draw: Draw) -> FeedForward:
        """The dense layer, or a choice of its neurons, changed at other neurons in each expert."""
        kept = self.kept(number, ffn, moe, draw)
        return kept.changed(lambda name, matrix, dim: self._change(name, matrix, dim, number, moe, draw))

    def kept(self, number: int, ffn: FeedForward, moe: ModelConfig, draw: Draw) -> FeedForward:
        """Expert `number` before any of it changes."""
        width = moe.expert_ffn_hidden_size
        if width == ffn.width:
            return ffn
        return ffn.neurons(draw.permutation(f"neurons.{number}", ffn.width)[:width])

    def _change(self, name: str, matrix: Tensor, dim: int, expert: int, moe: ModelConfig, draw: Draw) -> None:
        where = "changed" if self.shared_indices else f"changed.{name}"
        count = matrix.shape[dim]
        chosen = draw.permutation(f"{where}.{expert}", count)[: int(self.ratio * count)]
        if len(chosen):
            chosen = chosen.sort().values  # in the order of memory, which is faster
            changed = self.replacement(matrix.index_select(dim, chosen), moe, draw.generator(f"{name}.{expert}"))
            matrix.index_copy_(dim, chosen, changed)

    @abstractmethod
    def replacement(self, weights: Tensor, moe: ModelConfig, generator: torch.Generator) -> Tensor:
        """What takes the place of `weights`, those of some neurons in one matrix."""


@config
class Drop(PartlyNew):
    """A share of each expert's neurons is drawn from the normal distribution that the dropped weights had.

    The statistics are one mean and one standard deviation for each matrix, of its dropped part. The function changes
    with the ratio; at 0 this is a copy. A shared expert starts silent.
    """

    kind: Literal["drop"] = "drop"
    ratio: float = Field(default=0.5, ge=0, le=1)
    """Share of an expert's neurons that is drawn anew; the paper's best is 0.5."""
    shared_indices: bool = True
    """The same neurons in all matrices of an expert, as the paper says. False: other ones in each matrix, as its code
    does; at ratio r only a share (1 - r)^3 of the neurons is then left whole."""

    def changes(self, moe: ModelConfig) -> str | None:
        """At any ratio above 0."""
        return f"{self.ratio:.0%} of each expert's neurons are new" if self.ratio > 0 else narrowed(moe)

    def replacement(self, weights: Tensor, moe: ModelConfig, generator: torch.Generator) -> Tensor:
        """Normal with the mean and standard deviation of `weights`."""
        from megatron_ext.upcycling.normal import mean_and_std, normal_like

        return normal_like(weights, *mean_and_std(weights), generator)


def narrowed(moe: ModelConfig) -> str | None:
    """Why experts that are narrower than the dense layer do not compute what it does."""
    if moe.expert_ffn_hidden_size < moe.ffn_hidden_size:
        return f"experts have {moe.expert_ffn_hidden_size} of {moe.ffn_hidden_size} neurons"
    return None
