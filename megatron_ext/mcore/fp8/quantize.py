"""Tensors in 8-bit floating point: scales that are powers of two, the cast, and the way back."""

#   R rows and K columns of a matrix operand, K being contracted; r x c tiles of it share a scale

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {dtype: torch.finfo(dtype).max for dtype in (E4M3, E5M2)}
"""448 and 57344."""
# The smallest fp32 number that has a reciprocal: what the scale of an all-zero tile becomes.
_SMALLEST_SCALE = 2.0**-126

Tile = tuple[int | None, int | None]
"""Rows and columns that share a scale; None is all of them."""
WHOLE: Tile = (None, None)
ROW: Tile = (1, None)
_KERNEL_TILES = (WHOLE, ROW)


@dataclass(frozen=True)
class Quantized:
    """`values` [..., R, K] in fp8 and `scale` [..., R / r, K / c] in fp32, which they are to be multiplied by."""

    values: Tensor
    scale: Tensor
    tile: Tile

    def dequantize(self) -> Tensor:
        """The tensor in fp32, exactly: fp8 times a power of two."""
        return self.values.float() * _over_elements(self.scale, self.tile, self.values)


def tile_maxima(x_RK: Tensor, tile: Tile) -> Tensor:
    """The largest magnitude of each tile, [..., R / r, K / c] in fp32; not finite where the tile is not."""
    if tile in (WHOLE, ROW):
        dims = (-2, -1) if tile == WHOLE else (-1,)
        return torch.linalg.vector_norm(x_RK, ord=torch.inf, dim=dims, keepdim=True).float()
    r, c = tile
    assert r is not None
    assert c is not None
    rows, columns = x_RK.shape[-2:]
    whole_tiles = F.pad(x_RK, (0, -columns % c, 0, -rows % r))
    tiles = whole_tiles.unflatten(-1, (-1, c)).unflatten(-3, (-1, r))
    return torch.linalg.vector_norm(tiles, ord=torch.inf, dim=(-3, -1)).float()


def scale_for(maxima: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest power of two that brings `maxima` (fp32) into the range of `dtype`; NaN where not finite.

    Powers of two are the scales of the OCP MX formats, of Transformer Engine's blockwise recipe and of torchao's
    rowwise one. They only move the exponent: a number is rounded once, by the cast, and to the same value whichever
    tile it stands in (but for magnitudes below 2**-15 of the tile's largest, which become subnormal). A shard, the
    whole matrix and its transpose are thus quantised alike, so that the maxima of a present tensor need no reduction
    over a tensor-parallel group.
    """
    ratio = maxima / LARGEST[dtype]
    # Adding all mantissa bits carries into the exponent unless they are all zero.
    bits = ratio.clamp_min(_SMALLEST_SCALE).view(torch.int32)
    power = ((bits + 0x007F_FFFF) & 0x7F80_0000).view(torch.float32)
    return torch.where(ratio.isfinite(), power, torch.nan)


def quantize(
    x_RK: Tensor, dtype: torch.dtype, tile: Tile, maxima: Tensor, *, saturate: bool = False, triton: bool = False
) -> Quantized:
    """Cast to fp8 with one scale a tile.

    Args:
        x_RK: any floating type; leading dimensions are separate matrices.
        maxima: what `tile_maxima` gives, or an estimate. Where it is NaN or infinite the tile becomes NaN: a cast
            would turn infinity into the largest number, and what must stop the run would be hidden.
        saturate: whether `maxima` may be too small; larger values then become the largest fp8 number.
        triton: in one pass, by our own kernel (mcore/kernels/fp8_cast.py), where rows or whole tensors share a scale.
    """
    scale = scale_for(maxima, dtype)
    if triton and tile in _KERNEL_TILES:
        from megatron_ext.mcore.kernels.fp8_cast import cast

        return Quantized(cast(x_RK, scale, dtype, saturates=saturate), scale, tile)
    # A power of two is exact in every floating type, and so is the product.
    scaled = x_RK * _over_elements(scale.reciprocal().to(x_RK.dtype), tile, x_RK)
    if saturate:
        scaled = scaled.clamp_(-LARGEST[dtype], LARGEST[dtype])
    return Quantized(scaled.to(dtype).contiguous(), scale, tile)


def quantize_both(
    x_RK: Tensor,
    dtype: torch.dtype,
    tile: Tile,
    maxima: tuple[Tensor, Tensor],
    *,
    saturate: bool = False,
    triton: bool = False,
) -> tuple[Quantized, Quantized]:
    """Matrices and their transposes in fp8, each with its own scales; bit for bit what two calls of `quantize` give.

    Args:
        x_RK: leading dimensions are separate matrices.
        maxima: those of the matrices and of their transposes.
    """
    if triton and tile in _KERNEL_TILES:
        from megatron_ext.mcore.kernels.fp8_cast import cast_both

        scale, scale_t = (scale_for(largest, dtype) for largest in maxima)
        values, values_t = cast_both(x_RK, scale, scale_t, dtype, saturates=saturate)
        return Quantized(values, scale, tile), Quantized(values_t, scale_t, tile)
    straight = quantize(x_RK, dtype, tile, maxima[0], saturate=saturate)
    if tile == WHOLE:
        return straight, Quantized(straight.values.mT.contiguous(), straight.scale, tile)
    return straight, quantize(x_RK.mT, dtype, tile, maxima[1], saturate=saturate)


def _over_elements(per_tile: Tensor, tile: Tile, x_RK: Tensor) -> Tensor:
    """Repeat each tile's value over its elements, in the dimensions where broadcasting would not do it."""
    for dim, size in zip((-2, -1), tile, strict=True):
        if size is not None and size > 1:
            per_tile = per_tile.repeat_interleave(size, dim).narrow(dim, 0, x_RK.shape[dim])
    return per_tile
