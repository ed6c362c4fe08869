"""Noise upcycling: copies of the dense layer, with noise on a share of each expert's neurons.

The baseline of Drop-Upcycling (arXiv 2502.19261, section 4) that its released code has beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from megatron_ext.config import ModelConfig
from megatron_ext.config.base import config
from megatron_ext.upcycling.methods.drop import PartlyNew, narrowed

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@config
class Noise(PartlyNew):
    """Normal noise is added to a share of each expert's neurons; a shared expert starts silent."""

    kind: Literal["noise"] = "noise"
    ratio: float = Field(default=0.5, ge=0, le=1)
    """Share of an expert's neurons that get noise."""
    std: float = Field(default=0.02, ge=0)
    """Standard deviation of the noise."""
    shared_indices: bool = True
    """The same neurons in all matrices of an expert. False: other ones in each matrix."""

    def changes(self, moe: ModelConfig) -> str | None:
        """Unless there is none."""
        noisy = self.ratio > 0 and self.std > 0
        return f"{self.ratio:.0%} of each expert's neurons have noise" if noisy else narrowed(moe)

    def replacement(self, weights: Tensor, moe: ModelConfig, generator: torch.Generator) -> Tensor:
        """`weights` with noise."""
        from megatron_ext.upcycling.normal import with_normal_noise

        return with_normal_noise(weights, self.std, generator)
