"""megatron-core's parallel linear layers with our products, which add weights' gradients to their fp32 sums."""

#   M tokens of a whole TP group (sequence x micro-batch), K input and N output width of this rank

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers as core
from torch import Tensor

from megatron_ext.mcore.products import add_product, product
from megatron_ext.mcore.sequence_parts import gather, reduce_scatter


def gradient_sum(config: Any, weight: Tensor) -> Tensor | None:
    """The fp32 buffer that a product adds the gradient of `weight` to; None where autograd is to hand it on.

    With overlapped reduction megatron-core wants to see a gradient of each weight, and counts those.
    """
    return getattr(weight, "main_grad", None) if config.adds_weight_gradients and weight.requires_grad else None


class _LinearFunction(torch.autograd.Function):
    """`x @ w.T` between the collectives of megatron-core's own linear function.

    The gradient of `w` goes to its sum, where there is one. Bytes a weight and micro-batch: 8 (the sum read and
    written) in place of 12, and no gradient in bf16 in memory. megatron-core does that with NVIDIA Apex's extension,
    torch with a product of another output type.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_NK: Tensor, sum_NK: Tensor | None, group: Any, gathers: bool, reduces: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        # Not saved as an input: it changes between forward and backward, by design.
        ctx.sum, ctx.group, ctx.gathers, ctx.reduces = sum_NK, group, gathers, reduces
        whole = gather(x, group)[0] if gathers else x
        return product(whole, weight_NK.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_NK = ctx.saved_tensors
        whole, gathering = gather(x, ctx.group, wait=False) if ctx.gathers else (x, None)
        grad_x = grad_weight = reducing = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grads[0], weight_NK)
            if ctx.gathers:
                grad_x, reducing = reduce_scatter(grad_x, ctx.group)
            elif ctx.reduces:
                reducing = dist.all_reduce(grad_x, group=ctx.group, async_op=True)
        if gathering is not None:
            gathering.wait()
        grad_NM, whole_MK = grads[0].flatten(0, -2).t(), whole.flatten(0, -2)
        if ctx.sum is not None:
            add_product(ctx.sum, grad_NM, whole_MK)
        elif ctx.needs_input_grad[1]:
            grad_weight = product(grad_NM, whole_MK)
        if reducing is not None:
            reducing.wait()
        return grad_x, grad_weight, None, None, None, None


class _OwnProducts(torch.nn.Module):
    """Comes before one of megatron-core's linear layers in the order of bases, and takes over its product.

    Not where ours has nothing to gain: on CUDA where autograd is to hand on the weight's gradient.
    """

    config: Any

    def _forward_impl(
        self,
        input: Tensor,  # noqa: A002 - megatron-core's parameter name
        weight: Tensor,
        bias: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """megatron-core's hook for the product."""
        total = gradient_sum(self.config, weight)
        is_late = options["grad_output_buffer"] is not None  # the weight's gradient
        output: Tensor
        if is_late or (total is None and input.device.type != "cpu"):
            output = super()._forward_impl(input=input, weight=weight, bias=bias, **options)  # type: ignore[misc]
            return output
        group, gathers, reduces = (options[key] for key in ("tp_group", "sequence_parallel", "allreduce_dgrad"))
        output = _LinearFunction.apply(input, weight, total, group, gathers, reduces)
        return output if bias is None else output + bias


class ColumnParallelLinear(_OwnProducts, core.ColumnParallelLinear):
    """A linear layer split by output features."""


class RowParallelLinear(_OwnProducts, core.RowParallelLinear):
    """A linear layer split by input features."""
