"""Our model on the processes of a test: with initial weights, or with those of a transformers model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.normalized import NormalizedHfSource
from megatron_ext.canonical.catalogue import model_shapes
from megatron_ext.canonical.naming import storage_plan
from megatron_ext.checkpoint.streams import TensorSpec
from megatron_ext.config import Fp32Precision, ModelConfig, ParallelConfig, Precision, RecomputeConfig, RuntimeConfig
from megatron_ext.mcore.initialization import initialize_weights
from megatron_ext.mcore.model import build_chunks
from megatron_ext.mcore.state import shards_of
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.model_io.engine import MEGATRON, tasks_to_megatron
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from tests.unit.model_io.references import Tensors

FP32 = Fp32Precision(kind="fp32")


def build(model: ModelConfig, parallel: ParallelConfig, seed: int = 1) -> list:
    """This rank's chunks of our model in fp32, with the initial weights of `seed`."""
    split_process_group(parallel, RuntimeConfig(device="cpu"))
    seed_everything(0)
    config = transformer_config(model, parallel, FP32, RecomputeConfig())
    chunks = build_chunks(model, parallel, config, torch.device("cpu"))
    initialize_weights(model, list(chunks), seed)
    return list(chunks)


@dataclass(frozen=True)
class InMemory:
    """Tensors by name, as a source."""

    tensors: Tensors

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec(tuple(x.shape), x.dtype) for name, x in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def read_box(self, name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        return self.tensors[name][tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]


def canonical(tensors: Tensors, architecture: Architecture, model: ModelConfig) -> Tensors:
    """Weights, or gradients, of a transformers model under Megatron's names."""
    source = NormalizedHfSource(InMemory(tensors), architecture, model)
    return {
        task.writes[MEGATRON]: task.make({role: source.read(name) for role, name in task.reads.items()})[MEGATRON]
        for task in tasks_to_megatron(architecture.weights, model)
    }


def our_network(model: ModelConfig, precision: Precision, weights: Tensors) -> Any:
    """Our model on one process, with `weights` by canonical name."""
    config = transformer_config(model, ParallelConfig(), precision, RecomputeConfig())
    (network,) = build_chunks(model, ParallelConfig(), config, torch.device("cpu"))
    shapes = model_shapes(model)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes
    places = {}
    for name, (place, shape) in storage_plan(shapes).items():
        places.setdefault(place.key, torch.empty(shape))[place.index].copy_(weights[name])
    for pieces in shards_of(network).values():
        for piece in pieces:
            shard = tuple(slice(o, o + s) for o, s in zip(piece.offset, piece.shard_shape, strict=True))
            piece.data.copy_(places[piece.key][shard].view(piece.data.shape))
    return network


def gradients_by_name(network: Any, model: ModelConfig) -> Tensors:
    """The gradient of each weight, by canonical name."""
    places: Tensors = {}
    for weight, pieces in shards_of(network).items():
        for piece in pieces:
            shard = tuple(slice(o, o + s) for o, s in zip(piece.offset, piece.shard_shape, strict=True))
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad  # a buffer has none
            part = grad.flatten()[piece.start : piece.start + piece.data.numel()]
            places.setdefault(piece.key, torch.zeros(piece.global_shape))[shard] = part.view(piece.shard_shape).float()
    plan = storage_plan(model_shapes(model))
    return {name: places[place.key][place.index] for name, (place, _) in plan.items()}


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, of the scale of `b`."""
    scale = b.abs().max()
    return float((a - b).abs().max() / scale) if scale else float((a - b).abs().max())
