"""MoE health: what the routers of all ranks have counted, brought together in one small tensor."""

#   L layers of the whole model, E experts, T tokens

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ext.mcore.moe.counts import COLUMNS, LOSSES, MEANS, RouterCounts
from megatron_ext.mcore.moe.router import Router


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
    routers: Sequence[Router],
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
    table = torch.zeros(num_layers, num_experts + len(COLUMNS), dtype=torch.float64, device=device)
    for router in routers:
        assert router.layer_number is not None
        if router.counts.sums is not None:
            table[router.layer_number - 1] += router.counts.sums
        router.counts = RouterCounts(num_experts)
    dist.all_reduce(table, group=group)
    return {
        layer: _health(row[:num_experts], dict(zip(COLUMNS, row[num_experts:], strict=True)), num_microbatches)
        for layer, row in enumerate(table.tolist())
        if sum(row[:num_experts]) > 0
    }


def _health(load: list[float], sums: dict[str, float], num_microbatches: int) -> LayerHealth:
    assignments = sum(load)
    means = {name: sums[name] / sums["tokens"] for name in MEANS}
    return LayerHealth(
        load=[count / assignments for count in load],
        drop_rate=sums["dropped"] / assignments,
        entropy=means["entropy"] / math.log(len(load)),
        top1=means["top1"],
        max1_max2=means["ratio"],
        losses={kind: sums[kind] / num_microbatches for kind in LOSSES if sums[kind]},
    )
