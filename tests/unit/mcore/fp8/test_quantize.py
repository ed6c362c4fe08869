"""The cast to fp8 against the list of all fp8 numbers: rounding, scales of each tile, and what is not finite."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.mcore.fp8.quantize import (
    E4M3,
    E5M2,
    LARGEST,
    ROW,
    WHOLE,
    Quantized,
    Tile,
    quantize,
    scale_for,
    tile_maxima,
)

FORMATS = [E4M3, E5M2]
TILES: list[Tile] = [WHOLE, ROW, (1, 32), (1, 128), (128, 128)]
# Half a unit in the last place, relative to the number: 3 and 2 bits of mantissa.
HALF_ULP = {E4M3: 2.0**-4, E5M2: 2.0**-3}
# The distance of subnormal numbers, of which a scaled value is at most half away.
SUBNORMAL_STEP = {E4M3: 2.0**-9, E5M2: 2.0**-16}


def cast(x: torch.Tensor, dtype: torch.dtype = E4M3, tile: Tile = WHOLE) -> Quantized:
    return quantize(x, dtype, tile, tile_maxima(x, tile))


def wide(rows: int, columns: int) -> torch.Tensor:
    """Magnitudes over 40 powers of two, so that every binade and the subnormals of fp8 are met."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator) * 2.0 ** torch.randint(
        -30, 10, (rows, columns), generator=generator
    )


def every_number(dtype: torch.dtype) -> torch.Tensor:
    """All finite numbers of a format, in float64 and in order."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return numbers[numbers.isfinite()].sort().values


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
def test_each_value_becomes_the_nearest_number_of_the_format(dtype: torch.dtype, source: torch.dtype) -> None:
    x = wide(40, 50).to(source)
    quantized = cast(x, dtype)
    scaled = x.double() / quantized.scale.double()
    distance = (scaled.unsqueeze(-1) - every_number(dtype)).abs()
    nearest = distance.min(dim=-1).values
    assert torch.equal((quantized.values.double() - scaled).abs(), nearest)
    # Between two numbers equally near, the one with an even last bit.
    ties = (distance == nearest.unsqueeze(-1)).sum(dim=-1) == 2
    last_bit = quantized.values.view(torch.uint8)[ties & (scaled != 0)] & 1
    assert not last_bit.any()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_error_is_at_most_half_a_unit_in_the_last_place(dtype: torch.dtype, tile: Tile) -> None:
    x = wide(200, 300)
    quantized = cast(x, dtype, tile)
    error = (quantized.dequantize().double() - x.double()).abs()
    step = Quantized(torch.ones_like(quantized.values), quantized.scale, tile).dequantize() * SUBNORMAL_STEP[dtype]
    assert (error <= torch.maximum(HALF_ULP[dtype] * x.double().abs(), step.double() / 2)).all()


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_has_its_own_maximum_also_the_incomplete_ones(tile: Tile) -> None:
    x = wide(200, 300)
    rows, columns = (size or full for size, full in zip(tile, x.shape, strict=True))
    maxima = tile_maxima(x, tile)
    assert maxima.shape == (math.ceil(200 / rows), math.ceil(300 / columns))
    for i, band in enumerate(x.split(rows)):
        for j, block in enumerate(band.split(columns, dim=1)):
            assert maxima[i, j] == block.abs().max()


@given(st.floats(min_value=2.0**-110, max_value=2.0**120, width=32))
def test_scale_is_the_smallest_power_of_two_that_fits(maximum: float) -> None:
    for dtype in FORMATS:
        scale = float(scale_for(torch.tensor([maximum]), dtype))
        assert math.frexp(scale)[0] == 0.5
        assert maximum <= scale * LARGEST[dtype]
        assert maximum > scale / 2 * LARGEST[dtype]


def test_shards_and_transposes_are_quantised_like_the_whole() -> None:
    # Down to 2**-15 of the largest: below, a number may be subnormal in one tile and not in another.
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    x += x.sign() * 2.0**-12
    whole = cast(x).dequantize()
    for tile in TILES:
        halves = [cast(half, tile=tile).dequantize() for half in x.chunk(2, dim=1)]
        assert torch.equal(torch.cat(halves, dim=1), whole)
        assert torch.equal(cast(x.t(), tile=tile).dequantize().t(), whole)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_zeros_stay_zero(tile: Tile) -> None:
    assert not cast(torch.zeros(4, 64), tile=tile).dequantize().any()
    x = torch.zeros(4, 64)
    x[2, 5] = 3.0
    assert torch.equal(cast(x, tile=tile).dequantize(), x)


@pytest.mark.parametrize("value", [3.0e38, -3.0e38, 2.0**-100])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_the_largest_and_the_smallest_are_scaled_not_lost(value: float, dtype: torch.dtype) -> None:
    x = torch.full((2, 32), value)
    assert (cast(x, dtype).dequantize() / x - 1).abs().max() <= HALF_ULP[dtype]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("saturate", [False, True])
def test_what_is_not_finite_makes_its_tile_nan(value: float, tile: Tile, saturate: bool) -> None:
    """torch's cast alone would make infinity 448, and the run would go on."""
    x = torch.ones(256, 256)
    x[0, 5] = value
    broken = quantize(x, E4M3, tile, tile_maxima(x, tile), saturate=saturate).dequantize().isnan()
    rows, columns = (size or 256 for size in tile)
    assert broken[:rows, :columns].all()
    assert broken.sum() == rows * columns


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_values_above_an_estimated_maximum_saturate(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, -2.0, 1000.0, -1e30]])
    quantized = quantize(x, dtype, WHOLE, torch.tensor([[2.0]]), saturate=True)
    limit = LARGEST[dtype] * float(quantized.scale)
    assert quantized.dequantize().tolist() == [[1.0, -2.0, limit, -limit]]
