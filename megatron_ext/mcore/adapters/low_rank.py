"""The two halves of an adapter as this rank has them, and the adapters of one module together."""

#   x [..., inputs], A [rank, inputs], B [outputs, rank]; of routed experts each has one dimension more in front

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_ext.mcore.split_parameters import mark_as_split


@dataclass(frozen=True)
class LowRank:
    """What one adapter is, in any layout."""

    projection: str
    rank: int
    scale: float
    dropout: float


@dataclass(frozen=True)
class ModuleAdapters:
    """The adapters of one module, and how its outputs are made of those of its projections."""

    pairs: tuple[tuple[str, LowRank], ...]
    """By the linear layer within the module (empty where the module is one)."""
    outputs: tuple[tuple[str, int], ...]
    """Every projection of the module's outputs in their order, and how many of them it makes, over all TP ranks."""
    groups: int = 1
    """So many times the outputs repeat that order, each time with a share of every projection: query groups."""
    groups_are_split: bool = False
    """Whether tensor parallelism splits these groups; otherwise every projection by itself."""

    def of(self, linear: str = "") -> list[LowRank]:
        """The adapters of one linear layer."""
        return [pair for name, pair in self.pairs if name == linear]

    def assemble(self, parts: Mapping[str, Tensor], tp_size: int) -> Tensor:
        """The outputs of the module [..., rows / TP] out of those of its adapters; zeros where it has none."""
        if len(self.outputs) == 1:
            return next(iter(parts.values()))
        groups = self.groups // tp_size if self.groups_are_split else self.groups
        some = next(iter(parts.values()))
        whole = [
            parts[name] if name in parts else some.new_zeros(*some.shape[:-1], rows // tp_size)
            for name, rows in self.outputs
        ]
        return torch.cat([part.unflatten(-1, (groups, -1)) for part in whole], dim=-1).flatten(-2)


class Halves(torch.nn.Module):
    """A and B of one adapter, or of those of all local experts: their values are drawn by initialization.py."""

    def __init__(
        self, low_rank: LowRank, inputs: int, outputs: int, dtype: torch.dtype, experts: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.low_rank = low_rank
        where: dict[str, Any] = {"dtype": dtype, "device": torch.get_default_device()}
        self.A = torch.nn.Parameter(torch.empty(*experts, low_rank.rank, inputs, **where))
        self.B = torch.nn.Parameter(torch.empty(*experts, outputs, low_rank.rank, **where))
        self.B.is_adapter_output = True  # type: ignore[attr-defined]

    def forward(self) -> tuple[Tensor, Tensor]:
        """A and B, once they are whole.

        Reading them by a call lets megatron-core wait here for the ranks' updates of them (overlap_param_gather): it
        does so before a module with parameters of its own is called, and there only.
        """
        return self.A, self.B

    def dropped(self, x: Tensor, *, own_numbers: bool = False) -> Tensor:
        """`x` with the share that dropout leaves out.

        Args:
            own_numbers: `x` is this TP rank's alone, and so are the random numbers.
        """
        rate = self.low_rank.dropout
        if not rate or not self.training:
            return x
        with get_cuda_rng_tracker().fork() if own_numbers else contextlib.nullcontext():
            return F.dropout(x, rate)


def mark(parameter: torch.nn.Parameter, split_dim: int | None, *, sees_part: bool = False) -> None:
    """Tell megatron-core how TP has `parameter`.

    Args:
        split_dim: the dimension it is split in; None: every rank has the whole.
        sees_part: each rank has the gradient of its own tokens, and the sum over the TP group is the gradient.
    """
    if split_dim is None:
        parameter.sequence_parallel = sees_part  # type: ignore[attr-defined] # megatron-core's mark
    else:
        mark_as_split(parameter, split_dim)
