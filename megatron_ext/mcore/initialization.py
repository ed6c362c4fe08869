"""Initial weights drawn by parameter name: any parallel layout starts from the same model."""

import math

import torch

from megatron_ext.checkpoint.naming import seed_from_name
from megatron_ext.config import ModelConfig
from megatron_ext.mcore.state import ParameterShard, shards_of

_WRITES_TO_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialize_weights(model: ModelConfig, chunks: list[torch.nn.Module], seed: int) -> None:
    """Fill every parameter of `chunks` (the model chunks of this rank).

    Biases and a router's noise weights are 0, norms' weights 1. Matrices are normal with `init_method_std`, those that
    write to the residual stream with std / sqrt(2 * num_layers), as Megatron initialises. Each global tensor (each
    expert of a stacked one) is drawn from a generator seeded by `seed` and its checkpoint key, and this rank keeps its
    slice.
    """
    for chunk in chunks:
        for weight, pieces in shards_of(chunk).items():
            for piece in pieces if isinstance(weight, torch.nn.Parameter) else ():
                piece.data.copy_(_draw(model, piece, seed))


def _draw(model: ModelConfig, piece: ParameterShard, seed: int) -> torch.Tensor:
    if piece.key.endswith(("bias", "router.noise_weight")):
        return torch.zeros_like(piece.data)
    if "norm" in piece.key.rsplit(".", 2)[-1] or "layernorm" in piece.key:
        return torch.ones_like(piece.data)
    std = model.init_method_std
    if piece.key.endswith(_WRITES_TO_RESIDUAL):
        std /= math.sqrt(2 * model.num_layers)
    stacked = len(piece.global_shape) - piece.data.dim()
    name = ".".join((piece.key, *map(str, piece.offset[:stacked])))
    generator = torch.Generator(device=piece.data.device).manual_seed(seed_from_name(seed, name))
    whole = torch.empty(piece.global_shape[stacked:], device=piece.data.device).normal_(0.0, std, generator=generator)
    for dim, (start, size) in enumerate(zip(piece.offset[stacked:], piece.data.shape, strict=True)):
        whole = whole.narrow(dim, start, size)
    return whole
