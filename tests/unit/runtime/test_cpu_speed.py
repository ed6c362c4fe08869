"""bf16 on a CPU without instructions for it is seen and said: here by keeping oneDNN from AVX-512."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from megatron_ext.config import Bf16Precision, Fp32Precision, RuntimeConfig
from megatron_ext.runtime import cpu_speed

BF16 = Bf16Precision(kind="bf16")


def with_speeds(monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float) -> None:
    monkeypatch.setattr(cpu_speed, "product_speed", {torch.float32: fp32, torch.bfloat16: bf16}.__getitem__)


def test_bf16_at_a_fraction_of_fp32_is_said_with_both_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    with_speeds(monkeypatch, 117e9, 1.9e9)
    said = cpu_speed.slow_precision(RuntimeConfig(device="cpu"), BF16)
    assert said is not None
    assert "bf16 products run at 1.9 GFLOP/s on this CPU and fp32 ones at 117" in said
    assert "precision: {kind: fp32}" in said


def test_nothing_is_said_of_what_is_fast_or_not_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with_speeds(monkeypatch, 117e9, 1.9e9)
    assert cpu_speed.slow_precision(RuntimeConfig(device="cpu"), Fp32Precision(kind="fp32")) is None
    assert cpu_speed.slow_precision(RuntimeConfig(device="cuda"), BF16) is None
    with_speeds(monkeypatch, 76e9, 35e9)  # AVX-512 without bf16 instructions
    assert cpu_speed.slow_precision(RuntimeConfig(device="cpu"), BF16) is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instructions are x86's")
def test_a_cpu_without_avx_512_is_found_out() -> None:
    code = "from megatron_ext.runtime.cpu_speed import slow_bf16; print(slow_bf16())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    print(done.stdout)
    assert done.stdout.startswith("bf16 products run at ")
