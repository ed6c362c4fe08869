"""Weight gradients of a rank's experts, each added to its fp32 sum within the product over the expert's own tokens.

    sum[e] += g[rows of e]^T x[rows of e]

A grouped product of tokens sorted by expert, where a program has a tile of one expert's matrix and goes through that
expert's rows; what is summed is in fp32 from the first product to the buffer. Experts without tokens are not touched.
Bytes a weight and micro-batch: 8 (the sum read and written); torch's grouped product writes the gradient in bf16, which
is then read and added: 12.

torch's grouped kernel, torchao's and quack's give out matrices and add to none; Transformer Engine's grouped layer
adds, and is the other backend.
"""

#   T tokens sorted by expert, E experts, N output and K input width

import triton
import triton.language as tl
from torch import Tensor

_TILE, _WARPS = 128, 8
_STEP_BYTES = 128
"""Of a column, in one step through the rows: three steps of both operands fit an A100's shared memory, in fp32 too."""


@triton.jit
def _add(grad, x, ends, total, width_n, width_k, TILE: tl.constexpr, STEP: tl.constexpr):
    expert = tl.program_id(2)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(ends + expert)
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside_n, inside_k = (n < width_n)[None, :], (k < width_k)[None, :]
    if stop > start:
        product = tl.zeros((TILE, TILE), tl.float32)
        for first in range(start, stop, STEP):
            row = (first + tl.arange(0, STEP))[:, None]
            own = row < stop
            g = tl.load(grad + row.to(tl.int64) * width_n + n[None, :], mask=own & inside_n, other=0.0)
            tokens = tl.load(x + row.to(tl.int64) * width_k + k[None, :], mask=own & inside_k, other=0.0)
            product = tl.dot(tl.trans(g), tokens, product, input_precision="ieee")
        place = (expert.to(tl.int64) * width_n + n[:, None]) * width_k + k[None, :]
        inside = (n < width_n)[:, None] & inside_k
        tl.store(total + place, tl.load(total + place, mask=inside, other=0.0) + product, mask=inside)


def add_gradients(total_ENK: Tensor, grad_TN: Tensor, x_TK: Tensor, ends_E: Tensor) -> None:
    """Add each expert's `g.T @ x` over its own rows to `total_ENK`, which is fp32 and contiguous.

    Args:
        grad_TN: of the dtype of `x_TK`.
        ends_E: int32; expert e has the rows from `ends_E[e - 1]` up to `ends_E[e]`.
    """
    experts, width_n, width_k = total_ENK.shape
    grid = (triton.cdiv(width_n, _TILE), triton.cdiv(width_k, _TILE), experts)
    tensors = grad_TN.contiguous(), x_TK.contiguous(), ends_E, total_ENK
    step = _STEP_BYTES // x_TK.itemsize
    _add[grid](*tensors, width_n, width_k, TILE=_TILE, STEP=step, num_warps=_WARPS)
