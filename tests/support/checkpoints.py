"""Checkpoints of random weights, and exports whose configuration is edited."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_ext.canonical.catalogue import model_shapes
from megatron_ext.checkpoint.streams import MegatronSink, TensorSpec
from megatron_ext.config import GatingNormalization, ModelConfig, to_mapping
from megatron_ext.manifest import MANIFEST_FILE
from megatron_ext.testing.tiny import tiny_model

MODELS = {
    "dense": tiny_model(),
    "dense tied": tiny_model(untie_embeddings_and_output_weights=False, rotary_base=5e5, kv_channels=10),
    "MoE": tiny_model(moe=True, num_moe_experts=5, moe_ffn_hidden_size=41),
    "MoE pre-softmax": tiny_model(
        moe=True, moe_router_pre_softmax=True, moe_router_topk_scaling_factor=1.7, moe_router_topk=3
    ),
    "MoE plain": tiny_model(
        moe=True, moe_gating_normalization=None, moe_shared_expert_intermediate_size=None, moe_layer_freq=2
    ),
    "MoE population std": tiny_model(
        moe=True, moe_gating_normalization=GatingNormalization(scale=2.0, eps=1e-3, correction=0)
    ),
}


def write_checkpoint(
    directory: Path, model: ModelConfig, *, drop: str | None = None, seed: int = 5, run: Mapping[str, Any] | None = None
) -> Path:
    """A Megatron checkpoint with random weights, of a `run` if there was one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: shape for name, shape in model_shapes(model).items() if name != drop}
    specs = {name: TensorSpec(shape, torch.float32) for name, shape in shapes.items()}
    with MegatronSink(directory, specs, {**(run or {}), "model": to_mapping(model)}) as sink:
        for name, shape in shapes.items():
            sink.write(name, torch.randn(shape, generator=generator) * 0.1 + (1.0 if "norm" in name else 0.0))
    return directory


def edit_config(directory: Path, **changes: object) -> None:
    """Change config.json on purpose: the directory's manifest, where it has one, goes."""
    (directory / MANIFEST_FILE).unlink(missing_ok=True)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
