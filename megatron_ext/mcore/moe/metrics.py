"""MoE health: what the routers of all ranks have counted, brought together in one small tensor."""

#   L layers of the whole model, E experts, T tokens

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from megatron_ext.mcore.moe.router import Router

_MEANS = ("entropy", "top1", "ratio")
_LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss", "z_loss")
_COLUMNS = ("dropped", "tokens", *_MEANS, *_LOSSES)


class RouterCounts:
    """Sums over the tokens that one router has seen since the last report; nothing is read from the device here."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.sums: Tensor | None = None

    def add(self, load_E: Tensor, dropped: Tensor, probabilities_TE: Tensor) -> None:
        """Count a micro-batch: assignments, dropped ones, and the shape of the gate's distribution without noise."""
        best_T2 = probabilities_TE.topk(2, dim=-1).values
        entropy = torch.special.entr(probabilities_TE).sum()
        ratio = (best_T2[:, 0] / best_T2[:, 1].clamp(min=1e-9)).sum()
        tokens = load_E.new_full((), probabilities_TE.shape[0])
        row = torch.stack((dropped, tokens, entropy, best_T2[:, 0].sum(), ratio))
        self._add(torch.cat((load_E.float(), row, row.new_zeros(len(_LOSSES)))))

    def add_loss(self, kind: str, value: Tensor) -> None:
        """Add this rank's part of a loss, without its coefficient."""
        row = torch.zeros(self.experts + len(_COLUMNS), device=value.device)
        row[self.experts + _COLUMNS.index(kind)] = value.detach()
        self._add(row)

    def _add(self, row: Tensor) -> None:
        self.sums = row if self.sums is None else self.sums + row


@dataclass(frozen=True)
class LayerHealth:
    """How one MoE layer routed since the last report, over every token of every rank."""

    load: list[float]
    """The share of assignments that each expert was chosen for; a balanced expert has 1 / E."""
    drop_rate: float
    """The share of assignments dropped for want of capacity."""
    entropy: float
    """Mean entropy of a token's distribution over the experts, divided by ln E: 1 is undecided, 0 is certain."""
    top1: float
    """Mean probability of a token's best expert."""
    max1_max2: float
    """Mean ratio of a token's largest probability to its second largest (Skywork-MoE, section 4.1); 1 is undecided."""
    losses: dict[str, float]
    """Mean over micro-batches of each balance loss and of the z-loss, without coefficients; 1 is balanced."""

    @property
    def max_violation(self) -> float:
        """How far the busiest expert is above the mean load, as a share of it (MaxVio)."""
        return max(self.load) * len(self.load) - 1

    @property
    def dead_experts(self) -> int:
        """Experts that no token was sent to."""
        return sum(share == 0 for share in self.load)


ExpertStatistics = dict[int, LayerHealth]
"""The health of each MoE layer, by its index in the model."""


def collect_statistics(
    routers: Sequence["Router"],
    *,
    num_layers: int,
    num_experts: int,
    num_microbatches: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> ExpertStatistics:
    """Sum the counts of all ranks over `group` (one all-reduce of [L, E + 9]) and reset them.

    Every rank must call this, also those without a MoE layer. Each rank counts the tokens that are its own: under
    sequence and context parallelism the ranks that share a sequence have different ones, and the stages of a pipeline
    different layers.

    Args:
        num_microbatches: micro-batches of all ranks since the last report.
    """
    table = torch.zeros(num_layers, num_experts + len(_COLUMNS), dtype=torch.float64, device=device)
    for router in routers:
        assert router.layer_number is not None
        if router.counts.sums is not None:
            table[router.layer_number - 1] += router.counts.sums
        router.counts = RouterCounts(num_experts)
    dist.all_reduce(table, group=group)
    return {
        layer: _health(row[:num_experts], dict(zip(_COLUMNS, row[num_experts:], strict=True)), num_microbatches)
        for layer, row in enumerate(table.tolist())
        if sum(row[:num_experts]) > 0
    }


def _health(load: list[float], sums: dict[str, float], num_microbatches: int) -> LayerHealth:
    assignments = sum(load)
    means = {name: sums[name] / sums["tokens"] for name in _MEANS}
    return LayerHealth(
        load=[count / assignments for count in load],
        drop_rate=sums["dropped"] / assignments,
        entropy=means["entropy"] / math.log(len(load)),
        top1=means["top1"],
        max1_max2=means["ratio"],
        losses={kind: sums[kind] / num_microbatches for kind in _LOSSES if sums[kind]},
    )
