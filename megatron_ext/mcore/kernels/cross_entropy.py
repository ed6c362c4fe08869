"""Both passes of the cross-entropy over a vocabulary: log sum exp of each row, the gradient in the logits' place.

    z = log(sum over v of exp(x[v])),  dx[v] = exp(x[v] - z) g - (v = label) h,  0 in the padding

g and h are the gradients of z and of the label's logit (mcore/cross_entropy.py, which also brings the ranks of a split
vocabulary together). The sum is made while reading (online softmax: arXiv 1805.02867), in fp32, one program a row.
Bytes a logit: 2 forward, 4 backward; the torch steps move 66.

liger-kernel's loss writes the gradient in the forward pass already, so that log(Z) can have none of its own (the
output z-loss here does), and its version for a split vocabulary keeps the exponentials in fp32; torchao has none.
"""

#   T tokens, V vocabulary entries of this TP rank

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _log_sum(logits, log_sums, width, real, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = float("-inf")
    total = 0.0
    for start in range(0, real, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * width + column, mask=column < real, other=float("-inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(before, tl.max(x, axis=0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest), axis=0)
    tl.store(log_sums + row, largest + tl.log(total))


@triton.jit
def _gradient(logits, log_sums, labels, grad_sums, grad_labels, width, real, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * width + column, mask=column < real, other=float("-inf")).to(tl.float32)
    gradient = tl.exp(x - tl.load(log_sums + row)) * tl.load(grad_sums + row)
    gradient = tl.where(column == tl.load(labels + row), gradient - tl.load(grad_labels + row), gradient)
    tl.store(logits + row * width + column, tl.where(column < real, gradient, 0.0), mask=column < width)


def log_sum_exp(logits_TV: Tensor, real: int) -> Tensor:
    """Return log sum exp of the first `real` entries of each row, [T] in fp32; minus infinity where there are none."""
    tokens, width = logits_TV.shape
    log_sum_T = torch.full((tokens,), -torch.inf, dtype=torch.float32, device=logits_TV.device)
    if tokens and real:
        _log_sum[(tokens,)](logits_TV, log_sum_T, width, real, BLOCK=_BLOCK)
    return log_sum_T


def write_gradient(
    logits_TV: Tensor, log_sum_T: Tensor, labels_T: Tensor, grad_sum_T: Tensor, grad_label_T: Tensor, real: int
) -> None:
    """Write the gradient into `logits_TV`, which must be contiguous.

    Args:
        log_sum_T: fp32, over the whole vocabulary.
        labels_T: int64, entries of this rank.
        grad_sum_T: fp32, gradient of log(Z).
        grad_label_T: fp32, what is taken off at the label; 0 where another rank has it.
    """
    tokens, width = logits_TV.shape
    if tokens:
        grid = (tokens, triton.cdiv(width, _BLOCK))
        _gradient[grid](logits_TV, log_sum_T, labels_T, grad_sum_T, grad_label_T, width, real, BLOCK=_BLOCK)
