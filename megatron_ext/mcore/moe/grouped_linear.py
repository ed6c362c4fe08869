"""One linear layer an expert, over tokens sorted by expert: `grouped_mm` on CUDA, prepared shapes on CPU."""

#   T tokens sorted by expert, E experts, I width of the input, O width of the output; C tokens of each expert alike

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.mcore.products import add_product, is_compiled, write_product

# oneDNN compiles a kernel for every new shape of a product and keeps the last thousand: in bf16 compiling takes longer
# than such a product itself, a kernel takes 1.2 MB, and an expert has another number of tokens in each layer and step.
# Few numbers of rows mean few kernels. MKL, whose fp32 products are where they are not oneDNN's, compiles nothing.
FINE_STEP, COARSE_STEP = 32, 128


def grouped_linear(
    tokens_TI: Tensor, weight_EOI: Tensor, ends_E: Tensor, sum_EOI: Tensor | None = None, *, triton: bool = False
) -> Tensor:
    """Multiply each expert's rows of `tokens_TI` by the transpose of its own weight; return [T, O].

    Args:
        tokens_TI: rows sorted by expert; or [E, C, I], C rows of each, whose product is one of matrices in a batch.
        ends_E: int32; expert e has the rows from `ends_E[e - 1]` up to `ends_E[e]`.
        sum_EOI: where the weight's gradient is added to, in fp32; autograd then hands on none. On CUDA with `triton`.
        triton: add it by our own kernel (mcore/kernels/grouped_gradient.py).
    """
    if sum_EOI is not None and triton:
        output_TO = grouped_linear(tokens_TI, weight_EOI.detach(), ends_E)
        return _AddedGradient.apply(output_TO, weight_EOI, tokens_TI.detach(), sum_EOI, ends_E)
    if tokens_TI.dim() == 3:
        return torch.bmm(tokens_TI, weight_EOI.transpose(1, 2))
    if tokens_TI.device.type == "cpu":
        return _CpuGroupedLinear.apply(tokens_TI, weight_EOI, ends_E, sum_EOI)
    if torch.cuda.get_device_capability(tokens_TI.device) >= _WRITES_NOTHING_FOR_IDLE:
        weight_EOI = _IdleGradient.apply(weight_EOI, ends_E)
    return _grouped_kernel(tokens_TI, weight_EOI, ends_E)


# Compute capability from which on torch's grouped kernel leaves the weight gradients of experts without tokens as the
# memory was (pytorch#172439).
_WRITES_NOTHING_FOR_IDLE = (10, 0)


def _grouped_kernel(tokens_TI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """The grouped product of torch, which takes rows of whole 16 bytes only.

    No model in use has others, but a converted one may: both widths are then filled up with zeros.
    """
    width, step = weight_EOI.shape[1], 16 // tokens_TI.itemsize
    fill_O, fill_I = (-size % step for size in weight_EOI.shape[1:])
    if fill_O or fill_I:
        tokens_TI, weight_EOI = F.pad(tokens_TI, (0, fill_I)), F.pad(weight_EOI, (0, fill_I, 0, fill_O))
    output = F.grouped_mm(tokens_TI, weight_EOI.transpose(1, 2), offs=ends_E)
    return output[:, :width] if fill_O else output


class _AddedGradient(torch.autograd.Function):
    """The output as it is; of the weights it was made with, whose gradient is added to its sum."""

    @staticmethod
    def forward(
        ctx: Any, output_TO: Tensor, weight_EOI: Tensor, tokens_TI: Tensor, sum_EOI: Tensor, ends_E: Tensor
    ) -> Tensor:
        ctx.save_for_backward(tokens_TI, ends_E)
        # Not saved as an input: it changes between forward and backward, by design.
        ctx.sum = sum_EOI
        return output_TO.view_as(output_TO)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        from megatron_ext.mcore.kernels.grouped_gradient import add_gradients

        tokens_TI, ends_E = ctx.saved_tensors
        add_gradients(ctx.sum, grads[0].flatten(0, -2), tokens_TI.flatten(0, -2), ends_E)
        return grads[0], None, None, None, None


class _IdleGradient(torch.autograd.Function):
    """The weights as they are; their gradient is zero for experts that had no tokens, whatever came back for them."""

    @staticmethod
    def forward(ctx: Any, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(ends_E)
        return weight_EOI.view_as(weight_EOI)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (ends_E,) = ctx.saved_tensors
        busy_E = ends_E.diff(prepend=ends_E.new_zeros(1)) > 0
        return grads[0].where(busy_E.view(-1, 1, 1), 0.0), None


class _CpuGroupedLinear(torch.autograd.Function):
    """One product an expert, with numbers of rows for which oneDNN has a kernel already."""

    @staticmethod
    def forward(ctx: Any, tokens_TI: Tensor, weight_EOI: Tensor, ends_E: Tensor, sum_EOI: Tensor | None) -> Tensor:
        ctx.save_for_backward(tokens_TI, weight_EOI)
        # Not saved as an input: it changes between forward and backward, by design.
        ctx.ends, ctx.sum = ends_E.tolist(), sum_EOI
        return _rows_times(tokens_TI, weight_EOI.transpose(1, 2), ctx.ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        tokens_TI, weight_EOI = ctx.saved_tensors
        grad_TO = grads[0].contiguous()
        grad_tokens = _rows_times(grad_TO, weight_EOI, ctx.ends) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            operands = _of_experts(grad_TO, tokens_TI, ctx.ends)
            if ctx.sum is not None:
                for expert, grad, tokens in operands:
                    add_product(ctx.sum[expert], grad.t(), tokens)
            else:
                grad_weight = torch.empty_like(weight_EOI)
                for expert, grad, tokens in operands:
                    write_product(grad_weight[expert], grad.t(), tokens)
        return grad_tokens, grad_weight, None, None


def _rows_times(rows_TI: Tensor, matrices_EIO: Tensor, ends: list[int]) -> Tensor:
    output_TO = rows_TI.new_empty(rows_TI.shape[0], matrices_EIO.shape[2])
    for expert, start, stop in _windows(ends, compiled=is_compiled(rows_TI)):
        write_product(output_TO[start:stop], rows_TI[start:stop], matrices_EIO[expert])
    return output_TO


def _of_experts(grad_TO: Tensor, tokens_TI: Tensor, ends: list[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each expert, its gradient rows and its tokens; each is to be used before the next one is asked for.

    The gradient rows are filled up with zeros, and meet whatever tokens lie there.
    """
    compiled, total = is_compiled(tokens_TI), tokens_TI.shape[0]
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    filled = grad_TO.new_empty(max(_round_up(stop - start, compiled) for start, stop in spans), grad_TO.shape[1])
    for expert, (start, stop) in enumerate(spans):
        rows = _round_up(stop - start, compiled)
        first = min(start, total - rows)
        if rows == stop - start or first < 0:
            yield expert, grad_TO[start:stop], tokens_TI[start:stop]
            continue
        before, after = start - first, stop - first
        filled[:before] = 0
        filled[before:after] = grad_TO[start:stop]
        filled[after:rows] = 0
        yield expert, filled[:rows], tokens_TI[first : first + rows]


def _windows(ends: list[int], *, compiled: bool) -> Iterator[tuple[int, int, int]]:
    """Yield (expert, start, stop): ranges of rows to compute in this order, almost all of whole steps.

    A range may reach into the rows of the next experts: those are computed later, and right.
    """
    start = 0
    for expert, end in enumerate(ends):
        stop = start + _round_up(end - start, compiled)
        if stop <= ends[-1]:
            if stop > start:
                yield expert, start, stop
        else:  # nothing follows to reach into: whole steps, and then one more from the last row backwards
            step = _step(end - start, compiled)
            whole = start + (end - start) // step * step
            if whole > start:
                yield expert, start, whole
            yield expert, max(start, end - step), end
        start = end


def _round_up(count: int, compiled: bool) -> int:
    step = _step(count, compiled)
    return -(-count // step) * step


def _step(count: int, compiled: bool) -> int:
    """What numbers of rows about `count` are multiples of; a coarse step adds a quarter to them at most."""
    if not compiled:
        return 1
    return COARSE_STEP if count > 2 * COARSE_STEP else FINE_STEP
