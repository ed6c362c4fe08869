"""What a process with Transformer Engine does for the tests beside this file: build both backends, save, load, tell."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_ext.canonical.seeds import seed_from_name
from megatron_ext.checkpoint.load import load_shards
from megatron_ext.checkpoint.manager import CheckpointManager
from megatron_ext.checkpoint.shards import TensorShard
from megatron_ext.config import Fp8Precision, RuntimeConfig
from megatron_ext.config.machine import Backend
from megatron_ext.mcore.initialization import initialize_weights
from megatron_ext.mcore.model import build_chunks
from megatron_ext.mcore.state import model_shards
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.proving.parity import Cell
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.transformer_engine import as_on_hopper, build_with_transformer_engine

# key, global shape, offset and size of a shard
Place = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def build(cell: Cell, backend: Backend, *, seed: int) -> list[Any]:
    """The model chunks of this rank with weights drawn from `seed`."""
    if not parallel_state.model_parallel_is_initialized():
        split_process_group(cell.parallel, RuntimeConfig(device="cpu"))
    seed_everything(seed)
    arguments = (cell.model, cell.parallel, cell.precision, cell.recompute)
    if backend == "transformer_engine":
        _, chunks = build_with_transformer_engine(*arguments)
    else:
        chunks = list(build_chunks(cell.model, cell.parallel, transformer_config(*arguments), torch.device("cpu")))
    with as_on_hopper():
        initialize_weights(cell.model, chunks, seed)
    return chunks


def shards_of_chunks(chunks: list[Any]) -> list[TensorShard]:
    """The shards of `chunks` in order of their places."""
    with as_on_hopper():
        return sorted(model_shards(chunks), key=place)


def place(shard: TensorShard) -> Place:
    return shard.key, shard.global_shape, shard.offset, tuple(shard.data.shape)


def places(cell: Cell, backend: Backend) -> list[tuple[Place, torch.dtype]]:
    """Where each tensor of this rank stands in the checkpoint, and its dtype."""
    return [(place(shard), shard.data.dtype) for shard in shards_of_chunks(build(cell, backend, seed=1))]


def save(directory: Path, shards: list[TensorShard]) -> Path:
    """Save `shards` as step 1."""
    manager = CheckpointManager(directory, {})
    manager.register("model", tensors=lambda: shards)
    return manager.save(1)


def save_then_load(cell: Cell, source: Backend, target: Backend, directory: Path) -> tuple[int, list[str]]:
    """Save a model of `source`, load it into one of `target`; how many shards, and which differ in any bit."""
    saved = shards_of_chunks(build(cell, source, seed=1))
    checkpoint = save(directory, saved)
    loaded = shards_of_chunks(build(cell, target, seed=2))
    load_shards(checkpoint, loaded)
    pairs = [(a, b) for a, b in zip(saved, loaded, strict=True) if "_extra_state" not in a.key]
    return len(pairs), [a.key for a, b in pairs if not torch.equal(a.data, b.data)]


def expert_marks(cell: Cell) -> list[tuple[str, bool, bool, int]]:
    """Layer, allreduce, split over the TP group and split dimension of each parameter of the routed experts."""
    (chunk,) = build(cell, "transformer_engine", seed=1)
    return [
        (name.rsplit(".", 2)[-2], p.allreduce, p.tensor_model_parallel, p.partition_dim)
        for name, p in chunk.named_parameters()
        if ".experts." in name
    ]


FIELDS = (
    "transformer_impl fp8 fp8_recipe fp8_margin fp8_amax_history_len fp8_amax_compute_algo fp8_param bf16 "
    "first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 moe_router_padding_for_quantization"
).split()
RECIPE_FIELDS = ("margin", "amax_history_len", "amax_compute_algo")


def translated(cell: Cell) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """megatron-core's fields, and the class and fields of the recipe that Transformer Engine gets."""
    from megatron.core.fp8_utils import get_fp8_recipe

    split_process_group(cell.parallel, RuntimeConfig(device="cpu"))
    seed_everything(0)
    config, _ = build_with_transformer_engine(cell.model, cell.parallel, cell.precision, cell.recompute)
    recipe = get_fp8_recipe(config)
    fields = {name: getattr(recipe, name) for name in RECIPE_FIELDS if hasattr(recipe, name)}
    builtin = next(cls for cls in type(recipe).__mro__ if cls.__module__ == "transformer_engine.common.recipe")
    return (
        {name: getattr(config, name) for name in FIELDS},
        builtin.__name__,
        {**fields, "format": recipe.fp8_format.name},
    )


def scaling_shards(chunks: list[Any]) -> list[TensorShard]:
    return [shard for shard in shards_of_chunks(chunks) if "_extra_state" in shard.key]


def expected_scaling(shard: TensorShard) -> torch.Tensor:
    """Numbers that depend on the global place alone."""
    generator = torch.Generator().manual_seed(seed_from_name(0, shard.key))
    whole = torch.rand(shard.global_shape, generator=generator)
    return whole[tuple(slice(o, o + s) for o, s in zip(shard.offset, shard.data.shape, strict=True))]


def save_scaling(cell: Cell, directory: Path) -> list[str]:
    """Save a model whose delayed scaling has remembered something; the keys of that."""
    chunks = build(cell, "transformer_engine", seed=1)
    for shard in scaling_shards(chunks):
        shard.data.copy_(expected_scaling(shard))
    save(directory, shards_of_chunks(chunks))
    return sorted({shard.key for shard in scaling_shards(chunks)})


def load_scaling(cell: Cell, checkpoint: Path) -> tuple[int, int, int]:
    """Load, and begin the first pass; how much is as saved, as in a new model, and anything else."""
    chunks = build(cell, "transformer_engine", seed=2)
    load_shards(checkpoint, shards_of_chunks(chunks))
    _begin_first_pass(chunks, cell.precision)
    as_saved = as_new = other = 0
    for shard in scaling_shards(chunks):
        new = torch.ones_like(shard.data) if ".scale" in shard.key else torch.zeros_like(shard.data)
        if torch.equal(shard.data, new):
            as_new += 1
        elif torch.equal(shard.data, expected_scaling(shard)):
            as_saved += 1
        else:
            other += 1
    return as_saved, as_new, other


def _begin_first_pass(chunks: list[Any], precision: Any) -> None:
    """What each layer does to its scaling before its first matrix product."""
    from megatron.core.fp8_utils import get_fp8_context
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    assert isinstance(precision, Fp8Precision)
    for chunk in chunks:
        with as_on_hopper(), get_fp8_context(chunk.config):
            for module in chunk.modules():
                if isinstance(module, TransformerEngineBaseModule):
                    module.init_fp8_metadata(num_gemms=getattr(module, "num_gemms", 1))
                    assert module.fp8, "not an FP8 pass"


def load_into_torch(cell: Cell, checkpoint: Path) -> None:
    load_shards(checkpoint, shards_of_chunks(build(cell, "torch", seed=2)))


def fused_gradients(cell: Cell) -> tuple[set[bool], bool]:
    """Whether layers add weight gradients to the buffer in the product: Transformer Engine's, and the output layer."""
    (chunk,) = build(cell, "transformer_engine", seed=1)
    fused = {m.fuse_wgrad_accumulation for m in chunk.modules() if hasattr(m, "fuse_wgrad_accumulation")}
    return fused, chunk.output_layer.gradient_accumulation_fusion
