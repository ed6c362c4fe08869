"""How fast this CPU multiplies matrices in fp32, and in bf16, which one without AVX-512 does sixty times slower."""

import functools
import time

import torch

from megatron_ext.config import Precision, RuntimeConfig

_WIDTH = 384
_TRIES = 4
_SLOW = 4
"""bf16 with its own instructions is up to three times as fast as fp32, widened to fp32 half as fast."""


@functools.cache
def product_speed(dtype: torch.dtype) -> float:
    """FLOP/s of a product of two matrices of 384 x 384 in this process, the best of a few: 0.3 s on the slowest CPU."""
    a, best = torch.ones(_WIDTH, _WIDTH, dtype=dtype), float("inf")
    for _ in range(_TRIES):
        begun = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - begun)
    return 2 * _WIDTH**3 / best


def slow_bf16() -> str | None:
    """What bf16 costs on this CPU, measured, with the way out; None where it is no slower than one would expect."""
    fp32, bf16 = product_speed(torch.float32), product_speed(torch.bfloat16)
    if bf16 * _SLOW > fp32:
        return None
    return (
        f"bf16 products run at {bf16 / 1e9:,.1f} GFLOP/s on this CPU and fp32 ones at {fp32 / 1e9:,.0f}: it has no "
        "instructions for bf16 (AVX-512, AMX); set precision: {kind: fp32} for runs on it"
    )


def slow_precision(runtime: RuntimeConfig, precision: Precision) -> str | None:
    """Why a run in `precision` would crawl on this machine; None on a GPU, in fp32, and where bf16 is fast."""
    on_cpu = runtime.device == "cpu" or (runtime.device == "auto" and not torch.cuda.is_available())
    return slow_bf16() if on_cpu and precision.kind != "fp32" else None
