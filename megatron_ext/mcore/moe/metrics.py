"""What the routers of all ranks have counted, brought together in one small tensor."""

#   L layers of the whole model, E experts

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ext.mcore.moe.router import Router


@dataclass(frozen=True)
class ExpertStatistics:
    """Routing since the last report, over every token of every rank."""

    load: dict[int, list[float]]
    """For each MoE layer, the share of assignments that each expert received; a balanced expert has 1 / E."""
    balance_loss: dict[int, float]
    """For each MoE layer, the mean over micro-batches of its balance loss without coefficient; 1 is balanced."""

    def max_violation(self, layer: int) -> float:
        """How far the busiest expert of `layer` is above the mean load, as a share of it (MaxVio)."""
        load = self.load[layer]
        return max(load) * len(load) - 1


def collect_statistics(
    routers: Sequence[Router],
    *,
    num_layers: int,
    num_experts: int,
    num_microbatches: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> ExpertStatistics:
    """Sum the counts of all ranks over `group` (one all-reduce) and reset them.

    Every rank must call this, also those without a MoE layer. Each rank counts the tokens that are its own: under
    sequence parallelism the ranks of a TP group have different ones, and the stages of a pipeline different layers.

    Args:
        num_microbatches: micro-batches of all ranks since the last report.
    """
    counts = torch.zeros(num_layers, num_experts + 1, device=device)
    for router in routers:
        assert router.layer_number is not None
        row = counts[router.layer_number - 1]
        if router.load is not None:
            row[:num_experts] += router.load
        if router.balance_loss is not None:
            row[num_experts] += router.balance_loss
        router.reset_statistics()
    dist.all_reduce(counts, group=group)
    rows = {layer: row for layer, row in enumerate(counts.tolist()) if sum(row[:num_experts]) > 0}
    return ExpertStatistics(
        load={layer: [count / sum(row[:-1]) for count in row[:-1]] for layer, row in rows.items()},
        balance_loss={layer: row[-1] / num_microbatches for layer, row in rows.items()},
    )


def forget_core_statistics() -> None:
    """Empty megatron-core's own record of balance losses, before another model is built in this process.

    The record has one entry for each layer of the first model it met, and holds a process group.
    """
    try:
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    except ImportError:  # megatron-core 0.16
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        get_moe_layer_wise_logging_tracker().clear()
    else:
        destroy_moe_metrics_tracker()
