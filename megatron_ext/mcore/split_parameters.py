"""Parameters that tensor parallelism splits: what megatron-core is told of them, and how checkpoints describe them."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


def mark_as_split(parameter: torch.nn.Parameter, dim: int) -> torch.nn.Parameter:
    """Mark `parameter`, a part along `dim`, as split over the TP group; each rank has its part's whole gradient."""
    marked: Any = parameter
    marked.tensor_model_parallel = True
    marked.partition_dim, marked.partition_stride = dim, 1
    return parameter


def describe_split(
    module: torch.nn.Module,
    dims: Mapping[str, int],
    group: dist.ProcessGroup,
    prefix: str,
    sharded_offsets: tuple[Any, ...],
    metadata: dict[str, Any] | None,
) -> dict[str, Any]:
    """What `sharded_state_dict` says of the parameters of `module` itself, by name below `prefix`.

    Args:
        dims: the dimension in which `group`, the TP group, splits a parameter; those that are missing are whole on
            each of its ranks.
        metadata: of the caller's `sharded_state_dict`; it names the data-parallel group.
    """
    described: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        module.state_dict(prefix="", keep_vars=True),
        prefix,
        dict(dims),
        sharded_offsets,
        tp_group=group,
        dp_cp_group=(metadata or {})["dp_cp_group"],
    )
    return described
