"""megatron-core's parallel linear layers with their matrix products in fp8; communication stays megatron-core's."""

#   M tokens of a whole TP group (sequence x micro-batch), K input and N output width of this rank

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_ext.mcore.fp8.products import product
from megatron_ext.mcore.fp8.quantize import Quantized
from megatron_ext.mcore.fp8.scaling import Role, Scaling
from megatron_ext.mcore.linear import gradient_sum
from megatron_ext.mcore.products import add_product
from megatron_ext.mcore.sequence_parts import gather, reduce_scatter


class _LinearFunction(torch.autograd.Function):
    """`x @ w.T` with all three products in fp8, between the collectives of megatron-core's own linear function.

    y = q(x) q(w)^T, dx = q(g) q(w), dw = q(g)^T q(x), each operand quantised along the dimension that is contracted.
    What is kept for the backward pass is what megatron-core keeps: this rank's part of the input, and the weight.

    A weight gradient in bf16 is added to `sum_NK` within the product where that is given (mcore/linear.py). One in fp8
    is not: torch's scaled product adds to nothing, and its own error, of 4 % and more, is far above that of rounding
    it to bf16 before it is added up in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_NK: Tensor,
        scaling: Scaling,
        group: Any,
        gathers: bool,
        reduces: bool,
        sum_NK: Tensor | None = None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        # Not saved as an input: it changes between forward and backward, by design.
        ctx.sum = sum_NK
        ctx.scaling, ctx.group, ctx.gathers, ctx.reduces = scaling, group, gathers, reduces
        whole = gather(x, group)[0] if gathers else x
        x_MK = whole.reshape(-1, whole.shape[-1])
        x_max, ctx.x_max = scaling.lasting_maxima(Role.INPUT, x_MK)
        weight, ctx.weight_max = scaling.weight(weight_NK)
        y_MN = product(scaling.quantize(Role.INPUT, x_MK, x_max), weight, x.dtype, fast=True)
        return y_MN.view(*whole.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_NK = ctx.saved_tensors
        scaling, (needs_x, needs_weight, *_) = ctx.scaling, ctx.needs_input_grad
        grad_MN = grads[0].reshape(-1, grads[0].shape[-1])
        whole, gathering = gather(x, ctx.group, wait=False) if ctx.gathers and needs_weight else (x, None)
        grad, grad_t = _gradient_operands(scaling, grad_MN, needs_x, needs_weight)
        grad_x = grad_weight = reducing = None
        if grad is not None:
            grad_MK = product(grad, scaling.weight_t(weight_NK, ctx.weight_max), x.dtype, fast=False)
            grad_x = grad_MK.view(*grads[0].shape[:-1], -1)
            if ctx.gathers:
                grad_x, reducing = reduce_scatter(grad_x, ctx.group)
            elif ctx.reduces:
                reducing = dist.all_reduce(grad_x, group=ctx.group, async_op=True)
        if needs_weight:
            if gathering is not None:
                gathering.wait()
            x_MK = whole.reshape(-1, whole.shape[-1])
            if grad_t is None and ctx.sum is not None:
                add_product(ctx.sum, grad_MN.t(), x_MK)
            elif grad_t is None:
                grad_weight = grad_MN.t() @ x_MK
            else:
                x_KM = scaling.quantize(Role.INPUT, x_MK.t(), ctx.x_max)
                grad_weight = product(grad_t, x_KM, weight_NK.dtype, fast=False)
        if reducing is not None:
            reducing.wait()
        return grad_x, grad_weight, None, None, None, None, None


def _gradient_operands(
    scaling: Scaling, grad_MN: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Quantized | None, Quantized | None]:
    """The gradient for the input's product, and its transpose for the weight's; None where not needed in fp8."""
    transposes = needs_weight and scaling.precision.fp8_wgrad
    if needs_x and transposes:
        return scaling.quantize_both(Role.GRADIENT, grad_MN)
    straight = scaling.quantize(Role.GRADIENT, grad_MN) if needs_x else None
    return straight, scaling.quantize(Role.GRADIENT, grad_MN.t()) if transposes else None


class _Fp8Products(torch.nn.Module):
    """Comes before one of megatron-core's linear layers in the order of bases, and takes over its products.

    The recipe is `config.torch_fp8` (mcore/transformer_config.py).
    """

    def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        self.scaling = Scaling(config.torch_fp8, triton=config.triton_kernels)

    def _forward_impl(
        self,
        input: Tensor,  # noqa: A002 - megatron-core's parameter name
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **unused: Any,
    ) -> Tensor:
        """megatron-core's hook for the product. Unused is what needs Apex, or defers the embedding's gradient."""
        total = gradient_sum(self.config, weight)
        output: Tensor = _LinearFunction.apply(
            input, weight, self.scaling, tp_group, sequence_parallel, allreduce_dgrad, total
        )
        return output if bias is None else output + bias


class Fp8ColumnParallelLinear(_Fp8Products, ColumnParallelLinear):
    """A linear layer split by output features, its products in fp8."""


class Fp8RowParallelLinear(_Fp8Products, RowParallelLinear):
    """A linear layer split by input features, its products in fp8."""
