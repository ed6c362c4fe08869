"""This rank's gradients by the names of the weights, as backward passes left them and as the optimizer got them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_ext.mcore.state import shards_of

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
            flat: Tensor = param.main_grad.view(-1)  # type: ignore[attr-defined]
            start, end = reduced.get(param, (0, 0)) if is_split else (0, flat.numel())
            yield RawGradient(names.get(param, name), flat, start, end)


def nonfinite(tensor: Any) -> bool:
    """Whether something is a tensor with a number that is not finite."""
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
