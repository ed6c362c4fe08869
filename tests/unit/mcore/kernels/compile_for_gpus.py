"""Compiles every kernel for a kind of GPU, on any machine, and prints what of the machine code can be counted.

python compile_for_gpus.py 90 prints, as JSON by kernel: bytes of machine code, and how often some instructions occur.
"""

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_ext.mcore.kernels import cross_entropy, fp8_cast, gather_sum, grouped_gradient, rotary, sum_norm, swiglu

SIZE = "i32"
SWIGLU = {"projected": "*bf16", "weights": "*fp32", "width": SIZE, "limit": "fp32"}
SHAPE = {"SLOPE": 1.702, "OFFSET": 1.0, "LIMITED": True, "WEIGHTED": True, "BLOCK": swiglu._BLOCK}
LOSS = {"logits": "*bf16", "log_sums": "*fp32", "width": SIZE, "real": SIZE}
ROTATION = {
    **{name: SIZE for name in ("batch", "heads", "half", "rest", "x_token", "x_sample", "x_head")},
    **{name: "*fp32" for name in ("cosines", "sines")},
    **{name: "*bf16" for name in ("x", "y")},
    "direction": "fp32",
}
NORM = {
    **{name: "*bf16" for name in ("x", "residual", "weight", "bias", "total", "y", "grad", "grad_total", "grad_input")},
    **{name: "*fp32" for name in ("means", "scales", "grad_weights", "grad_biases")},
    **{name: SIZE for name in ("rows", "width", "rows_of_block")},
    "epsilon": "fp32",
}
STRIDES = ("x_matrix", "x_row", "inverse_matrix", "inverse_row", "inverse_t_matrix", "inverse_t_column")
CAST = {
    **{name: "*fp32" for name in ("inverse", "inverse_t")},
    **{name: SIZE for name in ("rows", "columns", *STRIDES)},
    "x": "*bf16",
}


def pairs(layout: rotary.Pairs) -> dict[str, bool]:
    return {
        "FROM_NEIGHBOURS": layout.from_neighbours,
        "TO_NEIGHBOURS": layout.to_neighbours,
        "LAST": layout.last,
        "PASSES": True,
    }


def kernels(capability: int) -> dict[str, tuple[Any, dict[str, str], dict[str, Any]]]:
    """By name: the kernel, types of its arguments, and those that are constants."""
    found = {
        "swiglu": (swiglu._forward, SWIGLU | {"output": "*bf16"}, SHAPE),
        "swiglu backward": (
            swiglu._backward,
            SWIGLU | {"grad": "*bf16", "grad_projected": "*bf16", "grad_weights": "*fp32"},
            SHAPE,
        ),
        "gather_sum": (
            gather_sum._sum,
            {"rows": "*bf16", "places": "*i64", "sums": "*bf16", "row_count": SIZE, "width": SIZE},
            {"PLACES": 6, "BLOCK": gather_sum._BLOCK},
        ),
        "grouped gradient": (
            grouped_gradient._add,
            {"grad": "*bf16", "x": "*bf16", "ends": "*i32", "total": "*fp32", "width_n": SIZE, "width_k": SIZE},
            {"TILE": grouped_gradient._TILE, "STEP": grouped_gradient._STEP_BYTES // 2},
        ),
        "rotate": (
            rotary._rotate,
            ROTATION,
            pairs(rotary.HALVES) | {"HEADS": rotary._TILE // 64, "HALF": 64, "REST": 64},
        ),
        "rotate latent": (
            rotary._rotate,
            ROTATION,
            pairs(rotary.LATENT) | {"HEADS": rotary._TILE // 32, "HALF": 32, "REST": 128},
        ),
        "sum and norm": (sum_norm._forward, NORM, {"CENTRED": True, "BLOCK": 4096}),
        "sum and norm, backward": (sum_norm._backward, NORM, {"CENTRED": True, "BLOCK": 4096}),
        "log_sum": (cross_entropy._log_sum, LOSS, {"BLOCK": cross_entropy._BLOCK}),
        "gradient": (
            cross_entropy._gradient,
            LOSS | {"labels": "*i64", "grad_sums": "*fp32", "grad_labels": "*fp32"},
            {"BLOCK": cross_entropy._BLOCK},
        ),
    }
    for form in ("fp8e4nv", "fp8e5") if capability >= 89 else ():
        types = CAST | {"values": f"*{form}", "values_t": f"*{form}"}
        options = {"LARGEST": 448.0, "SATURATES": True, "BOTH": True, "BLOCK": fp8_cast._BLOCK, "x_column": 1}
        found[f"cast {form}"] = (fp8_cast._cast, types, options)
    return found


def compiled(function: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> dict[str, int]:
    """Compile as a launch does whose pointers and sizes are multiples of 16."""
    names = function.arg_names
    source = ASTSource(
        function,
        {name: "constexpr" if name in constants else types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if name not in constants and types[name] != "fp32"
        },
    )
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm
    instructions = {
        "wide loads": "ld.global.v4",
        "atomics": "atom.",
        "casts": "cvt.rn.satfinite.e",
        "tensor cores": "wgmma",
    }
    return {"bytes": len(code["cubin"]), **{name: code["ptx"].count(text) for name, text in instructions.items()}}


if __name__ == "__main__":
    wanted = int(sys.argv[1])
    print(json.dumps({name: compiled(*kernel, wanted) for name, kernel in kernels(wanted).items()}))
