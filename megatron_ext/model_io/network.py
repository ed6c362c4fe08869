"""megatron-core's own model of any checkpoint, on one CPU process, to be looked at."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.canonical.catalogue import model_tensors
from megatron_ext.canonical.naming import StorageLocation, tensors_by_location
from megatron_ext.checkpoint.streams import TensorSource
from megatron_ext.config import Fp32Precision, ModelConfig, ParallelConfig, RecomputeConfig, RuntimeConfig
from megatron_ext.mcore.model import build_chunks
from megatron_ext.mcore.state import shards_of
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.runtime.device import choose_device
from megatron_ext.runtime.process_groups import end_process_groups, split_process_group, start_process_group
from megatron_ext.runtime.seeds import seed_everything


@contextmanager
def megatron_network(model: ModelConfig, tensors: TensorSource) -> Iterator[Any]:
    """The network of `model` in fp32 and in evaluation, with the canonical `tensors` as its weights.

    Starts a process group of one and leaves it at the end; enter it where none is running.
    """
    assert not dist.is_initialized(), "this needs a process of its own"
    # Overrides for training may ask for what one process cannot do, such as a first pipeline stage with fewer layers.
    model = replace(model, transformer_overrides=model.function_overrides)
    parallel, runtime = ParallelConfig(), RuntimeConfig(device="cpu")
    device = choose_device(runtime)
    start_process_group(runtime, device, alone=True)
    try:
        split_process_group(parallel, runtime)
        seed_everything(0)
        config = transformer_config(model, parallel, Fp32Precision(kind="fp32"), RecomputeConfig())
        (network,) = build_chunks(model, parallel, config, device)
        load_tensors(network, model, tensors)
        yield network.eval()
    finally:
        end_process_groups()


@torch.no_grad()
def load_tensors(network: Any, model: ModelConfig, tensors: TensorSource) -> None:
    """Fill the one-process `network` of `model` with canonical `tensors`, each read once."""
    known = tensors_by_location(model_tensors(model))
    for pieces in shards_of(network).values():
        for piece in pieces:
            within = len(piece.global_shape) - piece.data.dim()
            shard = tuple(slice(o, o + s) for o, s in zip(piece.offset, piece.shard_shape, strict=True))
            stacked = tuple(piece.offset[:within])
            whole = tensors.read(known[StorageLocation(piece.key, stacked)].name)
            piece.data.copy_(whole[shard[within:]].view(piece.data.shape))
