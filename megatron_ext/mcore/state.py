"""A rank's share of the training state as shards of global tensors, named as in the checkpoint.

Model weights, and the optimizer's flat shards of them, become lists of `TensorShard`: views of the live memory, and
where they stand in a global tensor. Saving reads the shards, loading fills them; neither needs communication, and the
names and shapes are the same in every parallel layout.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_ext.checkpoint.shards import TensorShard, shards_of_range
from megatron_ext.mcore.optimizer import main_parameters
from megatron_ext.mcore.scaling_state import ScalingState

_EXPERTS = ".mlp.experts."
"""In the key of a routed expert's weight, of which each rank of its own data-parallel group has a copy."""


@dataclass(frozen=True)
class ParameterShard:
    """A contiguous part of a parameter that is one shard of a global tensor.

    Most parameters are one piece. A SwiGLU fc1 weight is two (gate and up stand apart in the global tensor), a weight
    of stacked experts one or two for each expert.
    """

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: Tensor
    """View of the parameter; lacks the leading dimensions in which pieces are stacked."""
    start: int
    """Where the piece begins in the flattened parameter."""
    replica_id: tuple[int, ...]
    """(pipeline, tensor, data) number of this copy."""
    copies: int
    """How many data-parallel ranks hold one."""

    @property
    def is_writer(self) -> bool:
        """Whether this is the copy that is saved: of data-parallel ranks each saves some, for one would take longer."""
        *others, data = self.replica_id
        turn = zlib.crc32(f"{self.key} {self.offset}".encode()) % self.copies
        return not any(others) and data == turn

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Shape of the piece with its stacked dimensions."""
        return (1,) * (len(self.global_shape) - self.data.dim()) + tuple(self.data.shape)


def _entries(module: Any) -> Iterator[Any]:
    metadata = {
        "singleton_local_shards": False,
        "non_homogeneous_layers": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    yield from nested_values(module.sharded_state_dict(metadata=metadata))


def shards_of(module: torch.nn.Module) -> dict[Tensor, list[ParameterShard]]:
    """Every parameter and saved buffer of a model chunk, with its pieces."""
    return {
        entry.data: list(_pieces(entry))
        for entry in _entries(module)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }


def _pieces(entry: ShardedTensor | ShardedTensorFactory) -> Iterator[ParameterShard]:
    whole = entry.data
    if isinstance(entry, ShardedTensor):
        yield _piece(entry, whole.detach(), start=0)
        return
    # Building the factory on a tensor without memory shows where each part lies in the flattened parameter.
    shape_only = torch.empty(whole.shape, device="meta")
    parts = zip(entry.build(), entry.build_fn(entry.key, shape_only, entry.replica_id, None), strict=True)
    for part, layout in parts:
        assert layout.data._is_view(), f"{entry.key}: parts must be views"
        assert layout.data.is_contiguous(), f"{entry.key}: parts must be contiguous"
        yield _piece(part, part.data.detach(), start=layout.data.storage_offset())


def _piece(entry: ShardedTensor, data: Tensor, start: int) -> ParameterShard:
    assert isinstance(entry.replica_id, tuple)
    if _EXPERTS in entry.key:
        copies = parallel_state.get_expert_data_parallel_world_size()
    else:
        copies = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    place = tuple(entry.global_shape), tuple(entry.global_offset)
    return ParameterShard(entry.key, *place, data, start, entry.replica_id, copies)


def model_shards(chunks: list[torch.nn.Module]) -> list[TensorShard]:
    """The model weights of this rank, and the state of delayed scaling where layers have it."""
    weights = [
        TensorShard(p.key, p.global_shape, p.offset, p.data.view(p.shard_shape), is_writer=p.is_writer)
        for chunk in chunks
        for pieces in shards_of(chunk).values()
        for p in pieces
    ]
    return weights + [shard for chunk in chunks for shard in _scaling_shards(chunk)]


def _scaling_shards(chunk: torch.nn.Module) -> Iterator[TensorShard]:
    """The state of delayed scaling, `<layer>._extra_state.<what>`, stacked over experts where there are some.

    A checkpoint of another backend or recipe has none, or one of another length: then the history starts afresh.
    """
    for entry in _entries(chunk):
        if not isinstance(entry, ShardedObject) or not isinstance(entry.data, ScalingState):
            continue
        for name, tensor in entry.data.tensors.items():
            stacked = len(entry.global_shape)
            shape = (*entry.global_shape, *tensor.shape)
            offset = (*entry.global_offset, *(0,) * tensor.dim())
            data = tensor.detach()[(None,) * stacked]
            is_writer = not any(entry.replica_id)
            yield TensorShard(f"{entry.key}.{name}", shape, offset, data, is_writer=is_writer, optional=True)


def optimizer_shards(chunks: list[torch.nn.Module], optimizer: ChainedOptimizer) -> list[TensorShard]:
    """The optimizer state of this rank: fp32 weights and Adam's moments, `optimizer.state.<what>.<model key>`.

    The distributed optimizer's flat shards and the plain optimizer's whole tensors describe the same global tensors,
    so the two load each other's checkpoints; the keys are those of megatron-core's `fully_reshardable` format.
    """
    pieces = {param: p for chunk in chunks for param, p in shards_of(chunk).items()}
    shards: list[TensorShard] = []
    for part in optimizer.chained_optimizers:
        distributed = isinstance(part, DistributedOptimizer)
        for param, start, states in _parameter_states(part):
            for name, state in states.items():
                for piece in pieces[param]:
                    # A distributed shard exists once in its data-parallel group, whatever that group's rank is.
                    is_writer = not any(piece.replica_id[:-1]) if distributed else piece.is_writer
                    prefix = f"optimizer.state.{name}."
                    shards.extend(_shards_of_flat(piece, prefix, state.detach().view(-1), start, is_writer=is_writer))
    return shards


def gradient_shards(chunks: list[torch.nn.Module], optimizer: ChainedOptimizer) -> list[TensorShard]:
    """The reduced gradients that the optimizer is about to use, by the names of their weights.

    Over all ranks, those with `is_writer` are every number of every gradient once.
    """
    pieces = {param: p for chunk in chunks for param, p in shards_of(chunk).items()}
    shards: list[TensorShard] = []
    for part in optimizer.chained_optimizers:
        distributed = isinstance(part, DistributedOptimizer)
        for param, start, states in _parameter_states(part):
            gradient = states["param"].grad
            if gradient is None:
                continue
            for piece in pieces[param]:
                copy = piece.replica_id[:-1] if distributed else piece.replica_id
                flat = gradient.detach().view(-1)
                shards.extend(_shards_of_flat(piece, "", flat, start, is_writer=not any(copy)))
    return shards


def _shards_of_flat(
    piece: ParameterShard, prefix: str, shard: Tensor, start: int, *, is_writer: bool
) -> Iterator[TensorShard]:
    """The shards of `piece` that `shard` covers; `shard` begins at `start` of the flattened parameter."""
    low = max(start, piece.start)
    high = min(start + shard.numel(), piece.start + piece.data.numel())
    if low >= high:
        return
    for local_offset, size in shards_of_range(piece.shard_shape, low - piece.start, high - piece.start):
        count = math.prod(size)
        data = shard[low - start : low - start + count].view(size)
        offset = tuple(a + b for a, b in zip(piece.offset, local_offset, strict=True))
        yield TensorShard(prefix + piece.key, piece.global_shape, offset, data, is_writer=is_writer)
        low += count


def _parameter_states(part: Any) -> Iterator[tuple[Tensor, int, dict[str, Tensor]]]:
    """Yield (model parameter, where this rank's shard of it starts, fp32 weight and moments)."""
    for param, start, main in main_parameters(part):
        yield param, start, _states(part.optimizer, main)


def _states(inner: torch.optim.Optimizer, main: Tensor) -> dict[str, Tensor]:
    moments = inner.state[main]
    return {"param": main, "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
