"""Drop-Upcycling: copies of the dense layer in which each expert has a share of its neurons drawn anew.

Nakamura et al. 2025 (arXiv 2502.19261), section 3.2, and the code released with it.
"""

from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from megatron_ext.config import ModelConfig
from megatron_ext.config.base import config
from megatron_ext.errors import ConfigError
from megatron_ext.upcycling.feed_forward import FeedForward
from megatron_ext.upcycling.method import Draw, Method


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
        return kept.over_matrices(lambda name, matrix: self._changed(name, matrix, number, moe, draw))

    def kept(self, number: int, ffn: FeedForward, moe: ModelConfig, draw: Draw) -> FeedForward:
        """Expert `number` before any of it changes."""
        width = moe.expert_ffn_hidden_size
        if width == ffn.width:
            return ffn
        return ffn.neurons(draw.permutation(f"neurons.{number}", ffn.width)[:width])

    def _changed(self, name: str, matrix: Tensor, expert: int, moe: ModelConfig, draw: Draw) -> Tensor:
        where = "changed" if self.shared_indices else f"changed.{name}"
        chosen = draw.permutation(f"{where}.{expert}", len(matrix))[: int(self.ratio * len(matrix))]
        if len(chosen) == 0:
            return matrix
        result = matrix.clone()
        result[chosen] = self.replacement(matrix[chosen], moe, draw.generator(f"{name}.{expert}"))
        return result

    @abstractmethod
    def replacement(self, rows: Tensor, moe: ModelConfig, generator: torch.Generator) -> Tensor:
        """What takes the place of `rows` [n, ...], the same neurons' weights in one matrix."""


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

    def replacement(self, rows: Tensor, moe: ModelConfig, generator: torch.Generator) -> Tensor:
        """Normal with the mean and standard deviation of `rows`."""
        values = rows.float()
        std = values.std() if values.numel() > 1 else values.new_zeros(())
        drawn = torch.randn(values.shape, generator=generator) * std + values.mean()
        return drawn.to(rows.dtype)


def narrowed(moe: ModelConfig) -> str | None:
    """Why experts that are narrower than the dense layer do not compute what it does."""
    if moe.expert_ffn_hidden_size < moe.ffn_hidden_size:
        return f"experts have {moe.expert_ffn_hidden_size} of {moe.ffn_hidden_size} neurons"
    return None
