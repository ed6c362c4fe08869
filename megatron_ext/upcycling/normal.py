"""Normal random numbers for large tensors, and the statistics of what they replace, piece by piece in fp32."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_ext.merging.pieces import PIECE, pieces


def normal_like(tensor: Tensor, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """Normal numbers of the tensor's shape and dtype, drawn in fp32."""
    result = torch.empty(tensor.shape, dtype=tensor.dtype)
    for target, drawn in zip(pieces(result), _drawn(tensor.numel(), generator), strict=True):
        target.copy_(drawn.mul_(std).add_(mean))
    return result


def with_normal_noise(tensor: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """The tensor with normal noise, added in fp32 at least."""
    result = tensor.clone(memory_format=torch.contiguous_format)
    for target, drawn in zip(pieces(result), _drawn(tensor.numel(), generator), strict=True):
        target.copy_(target + drawn.mul_(std))
    return result


def mean_and_std(tensor: Tensor) -> tuple[float, float]:
    """The mean and the standard deviation (that of a sample, n - 1) of all elements; of one element 0."""
    parts, count = pieces(tensor), tensor.numel()
    shift = float(parts[0].float().mean())  # so that squares do not cancel where the mean is large
    total = square = 0.0
    for piece in parts:
        shifted = piece.float() - shift
        total += float(shifted.sum())
        square += float(shifted.dot(shifted))
    variance = (square - total**2 / count) / max(count - 1, 1)
    return shift + total / count, math.sqrt(max(variance, 0.0))


def _drawn(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Standard normal numbers in pieces, each gone when the next one comes."""
    memory = torch.empty(min(count, PIECE))
    for start in range(0, count, PIECE):
        yield memory[: count - start].normal_(generator=generator)
