"""This rank's gradients by the names of the weights, as backward passes left them and as the optimizer got them."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_ext.mcore.state import gradient_shards, shards_of

GROUPS = ("embedding", "norm", "attention", "mlp", "router", "experts", "shared_experts", "output")
"""What the weights of a model are told apart by, beside the layer."""
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_WORDS = {
    "norm": re.compile(r"(layer_?norm|norm\b|_norm)"),
    "router": re.compile(r"\.router\."),
    "shared_experts": re.compile(r"\.shared_experts\."),
    "experts": re.compile(r"\.experts\."),
    "attention": re.compile(r"\.self_attention\."),
    "mlp": re.compile(r"\.mlp\."),
    "embedding": re.compile(r"^embedding\."),
}


def place_of(key: str) -> tuple[int | None, str]:
    """The layer (counted from 0; None outside the layers) and the group of the weight `key`."""
    layer = _LAYER.search(key)
    group = next((name for name, word in _WORDS.items() if word.search(key)), "output")
    return (int(layer[1]) if layer else None), group


@dataclass(frozen=True)
class RawGradient:
    """The gradient of one parameter in the buffer that the data-parallel ranks reduce."""

    key: str
    """Name of the weight in checkpoints."""
    data: Tensor
    """Flattened. Between `start` and `end` it is reduced over the data-parallel ranks, elsewhere it is this rank's own
    (the distributed optimizer reduces to each rank what that rank updates)."""
    start: int
    end: int


def raw_gradients(chunks: Sequence[torch.nn.Module], optimizer: ChainedOptimizer) -> Iterator[RawGradient]:
    """The gradient of every parameter of this rank, in the order of the model."""
    reduced: dict[Tensor, tuple[int, int]] = {}
    is_split = False
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer:
            is_split = True
            for param in part.model_param_group_index_map:
                owned = part._get_model_param_range_map(param)["param"]
                reduced[param] = (owned.start, owned.end)
    for chunk in chunks:
        names = {param: pieces[0].key for param, pieces in shards_of(chunk).items()}
        for name, param in chunk.named_parameters():
            if not param.requires_grad:
                continue
            flat: Tensor = param.main_grad.view(-1)  # type: ignore[attr-defined]
            start, end = reduced.get(param, (0, 0)) if is_split else (0, flat.numel())
            yield RawGradient(names.get(param, name), flat, start, end)


@dataclass(frozen=True)
class GradientStatistics:
    """What is said of the gradients of one group of weights, before clipping."""

    norm: float
    """L2 norm."""
    max: float
    """The largest magnitude."""
    mean: float
    """The mean magnitude."""
    zeros: float
    """The share of numbers that are exactly 0."""


@torch.no_grad()
def gradient_statistics(
    chunks: list[torch.nn.Module], optimizer: ChainedOptimizer, num_layers: int, group: dist.ProcessGroup
) -> dict[tuple[int | None, str], GradientStatistics]:
    """Statistics over all ranks by layer (None outside the layers) and group; once the optimizer has the gradients.

    Every number counts once, however it is split or copied. Two all-reduces of a small table; every rank must call it.
    """
    device = next(parameter.device for chunk in chunks for parameter in chunk.parameters())
    # A row for each layer and group, the last ones outside the layers: squares, magnitudes, zeros, numbers.
    sums = torch.zeros((num_layers + 1) * len(GROUPS), 4, dtype=torch.float64, device=device)
    most = torch.zeros(len(sums), dtype=torch.float64, device=device)
    for shard in gradient_shards(chunks, optimizer):
        if not shard.is_writer:
            continue
        layer, name = place_of(shard.key)
        row = (num_layers if layer is None else layer) * len(GROUPS) + GROUPS.index(name)
        sizes = shard.data.abs().double()
        zeros = (sizes == 0).sum(dtype=torch.float64)
        sums[row] += torch.stack((sizes.square().sum(), sizes.sum(), zeros, torch.full_like(zeros, sizes.numel())))
        most[row] = torch.maximum(most[row], sizes.max())
    dist.all_reduce(sums, group=group)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    found: dict[tuple[int | None, str], GradientStatistics] = {}
    for row, ((squares, total, zeros, count), largest) in enumerate(zip(sums.tolist(), most.tolist(), strict=True)):
        if count:
            layer, kind = divmod(row, len(GROUPS))
            place = (layer if layer < num_layers else None, GROUPS[kind])
            found[place] = GradientStatistics(math.sqrt(squares), largest, total / count, zeros / count)
    return found


def nonfinite(tensor: Any) -> bool:
    """Whether something is a tensor with a number that is not finite."""
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
