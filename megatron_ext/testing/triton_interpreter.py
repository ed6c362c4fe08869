"""Triton's interpreter for tests: kernels computed on a CPU, with the rounding that a GPU has.

TRITON_INTERPRET=1 must be set before anything imports triton, which megatron-core does.
"""

import os
from typing import Any

import torch


def why_not_interpreting() -> str | None:
    """Why kernels cannot be interpreted in this process; None where they can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed (pip install triton)"
    return None if os.environ.get("TRITON_INTERPRET") == "1" else "TRITON_INTERPRET=1 is not set"


def round_to_nearest() -> None:
    """Have the interpreter round to the nearest number of a shorter format, ties to even, as GPUs and torch do.

    Its own conversion cuts bf16 off, rounds halves of FP8 up and loses the carry into the exponent (triton 3.7,
    runtime/interpreter.py).
    """
    from triton.runtime import interpreter

    interpreter._convert_float = _convert


def _convert(numbers: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    """Convert the bits `numbers` (a numpy array) of Triton's type `source` into those of `target`."""
    import numpy as np

    formats = {
        "fp16": torch.float16,
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "fp8e4nv": torch.float8_e4m3fn,
        "fp8e5": torch.float8_e5m2,
    }
    bits = {1: (torch.uint8, np.uint8), 2: (torch.uint16, np.uint16), 4: (torch.uint32, np.uint32)}
    given = bits[source.primitive_bitwidth // 8][1]
    tensor = torch.from_numpy(np.ascontiguousarray(numbers).view(given)).view(formats[source.name])
    converted = tensor.to(formats[target.name])
    return converted.view(bits[target.primitive_bitwidth // 8][0]).numpy()
