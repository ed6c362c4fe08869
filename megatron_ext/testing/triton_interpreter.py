"""Triton's interpreter for tests: kernels computed on a CPU, with the rounding and the products that a GPU has.

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


def mend_interpreter() -> None:
    """Have the interpreter compute as GPUs and torch do (triton 3.7, runtime/interpreter.py).

    It rounds to the nearest number of a shorter format, ties to even: its own conversion cuts bf16 off, rounds halves
    of FP8 up and loses the carry into the exponent. And it multiplies matrices of bf16: its own product takes their
    bits for integers.
    """
    import numpy as np
    from triton.language import float32
    from triton.runtime import interpreter

    interpreter._convert_float = _convert
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "multiplies_bf16", False):
        return
    dot = builder.create_dot

    def of_fp32(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        def widened(x: Any) -> Any:
            if x.dtype.scalar.name != "bf16":
                return x
            return interpreter.TensorHandle(_convert(x.data, x.dtype.scalar, float32, None).view(np.float32), float32)

        return dot(self, widened(a), widened(b), *rest)

    builder.create_dot, builder.multiplies_bf16 = of_fp32, True


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
