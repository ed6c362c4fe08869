"""Amounts as people read them."""

import pytest

from megatron_ext.planning.amounts import duration, flops, short_number, size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (short_number(7_512_395_776), "7.51B"),
        (short_number(999_700), "1.00M"),
        (short_number(58_272), "58.3K"),
        (short_number(12), "12"),
        (flops(998e6), "998 MFLOP"),
        (flops(4.12e14), "412 TFLOP"),
        (flops(0.0), "0 FLOP"),
        (size(1_234_567_890), "1.23 GB"),
        (size(12), "12 bytes"),
        (duration(0.4), "0 s"),
        (duration(75), "1 min 15 s"),
        (duration(3600 * 30), "1 d 6 h"),
        (duration(3600 * 11.5), "11 h"),
        (duration(60), "1 min"),
    ],
)
def test_amounts(text: str, expected: str) -> None:
    assert text == expected
