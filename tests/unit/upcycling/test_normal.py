"""Random numbers and statistics in pieces: those of the whole tensor."""

import pytest
import torch

from megatron_ext.upcycling.normal import mean_and_std, normal_like, with_normal_noise

SHAPE = (300, 700)  # three pieces and a part of one


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.02), (5.0, 1e-2)])
def test_statistics_are_those_of_float64(dtype: torch.dtype, mean: float, std: float) -> None:
    tensor = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * std + mean).to(dtype)
    exact = tensor.double()
    # fp32 sums of 65536 elements, eight or more at a time
    assert mean_and_std(tensor) == pytest.approx((float(exact.mean()), float(exact.std())), rel=1e-5, abs=1e-7)


def test_one_element_has_no_spread() -> None:
    assert mean_and_std(torch.tensor([3.0])) == (3.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_drawn_numbers_have_the_distribution(dtype: torch.dtype) -> None:
    drawn = normal_like(torch.empty(SHAPE, dtype=dtype), 1.0, 0.5, torch.Generator().manual_seed(1))
    assert (drawn.dtype, drawn.shape) == (dtype, SHAPE)
    mean, std = mean_and_std(drawn)
    error = 0.5 / drawn.numel() ** 0.5
    assert abs(mean - 1) < 5 * error
    assert abs(std - 0.5) < 5 * error
    below = (drawn.float() < 1 - 2 * 0.5).float().mean()
    assert abs(float(below) - 0.02275) < 0.002  # the normal distribution below -2; a bf16 step is 0.4 % of it


def test_pieces_do_not_repeat() -> None:
    drawn = normal_like(torch.empty(3 << 16), 0.0, 1.0, torch.Generator().manual_seed(2))
    assert abs(float(torch.corrcoef(drawn.view(3, -1))[0, 1:].abs().max())) < 5 / 256


def test_noise_is_added_before_rounding() -> None:
    tensor = torch.full(SHAPE, 1.0, dtype=torch.bfloat16)
    noisy = with_normal_noise(tensor.t(), 0.25, torch.Generator().manual_seed(3))
    noise = normal_like(tensor.t().float(), 0.0, 0.25, torch.Generator().manual_seed(3))
    assert torch.equal(noisy, (1.0 + noise).bfloat16())
    assert bool((tensor == 1).all())


def test_not_a_number_stays_visible() -> None:
    tensor = torch.tensor([1.0, float("nan")] * 8)
    drawn = normal_like(tensor, *mean_and_std(tensor), torch.Generator().manual_seed(4))
    assert bool(drawn.isnan().all())
