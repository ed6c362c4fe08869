"""Peaks of GPUs are found by the names that drivers give them."""

import pytest

from megatron_ext.config import Bf16Precision, Fp8Precision, Fp32Precision
from megatron_ext.planning.peaks import peak_tflops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("AMD Instinct MI300X", 1307.4),
        ("Tesla T4", None),
    ],
)
def test_the_dense_bf16_peak(name: str, peak: float | None) -> None:
    assert peak_tflops(name, Bf16Precision(kind="bf16")) == peak
    assert peak_tflops(name, Fp8Precision(kind="fp8")) == peak
    assert peak_tflops(name, Fp32Precision(kind="fp32")) is None
