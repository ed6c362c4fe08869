"""What is no number is found in tensors of every dtype: NaN, and infinity on both sides."""

import pytest
import torch

from megatron_ext.model_io.finite import is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_found(value: float, dtype: torch.dtype) -> None:
    numbers = torch.linspace(-3.0, 3.0, 12).view(3, 4)
    assert is_finite(numbers.to(dtype))
    numbers[1, 2] = value
    assert not is_finite(numbers.to(dtype))


def test_tensors_without_such_values_are_finite() -> None:
    assert is_finite(torch.empty(0, 4))
    assert is_finite(torch.tensor([1, 2**62]))
