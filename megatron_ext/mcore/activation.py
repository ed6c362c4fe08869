"""Gated activations (SwiGLU and its kin) as one autograd step that keeps nothing but its input."""

#   F width of the feed-forward network

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def gated_activation(
    projected: Tensor, activation: Activation, weights: Tensor | None = None, *, triton: bool = False
) -> Tensor:
    """Return `activation(gate) * up`, times `weights`, for the halves gate and up of the last dimension.

    Plain autograd would keep the activated gate and each product for the backward pass; here they are computed again
    from `projected`, which is cheap beside the matrix products around it.

    Args:
        projected: [..., 2 F], gate before up.
        activation: applied elementwise to the gate.
        weights: [...], one factor a row (routing weights), of any floating dtype.
        triton: by our own kernels where there is one, which is of SwiGLU (mcore/kernels/swiglu.py).

    Returns:
        [..., F] in the dtype of `projected`.
    """
    if triton and activation is F.silu:
        from megatron_ext.mcore.kernels.swiglu import swiglu

        return swiglu(projected, weights)
    output: Tensor = _GatedActivation.apply(projected, weights, activation)
    return output


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, weights: Tensor | None, activation: Activation) -> Tensor:
        ctx.save_for_backward(projected, weights)
        ctx.activation = activation
        gate, up = projected.chunk(2, dim=-1)
        output = activation(gate).mul_(up)
        return output if weights is None else output.mul_(weights.unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        projected, weights = ctx.saved_tensors
        gate, up = projected.chunk(2, dim=-1)
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated_with_graph = ctx.activation(gate)
        activated = activated_with_graph.detach()
        grad_projected = torch.empty_like(projected)
        grad_gate, grad_up = grad_projected.chunk(2, dim=-1)
        grad, grad_weights = grads[0], None
        if weights is not None:
            unweighted = torch.mul(activated, up, out=grad_up)  # its place is free until the gradient is written there
            grad_weights = unweighted.mul_(grad).sum(dim=-1, dtype=torch.float32).to(weights.dtype)
            grad = grad.clone().mul_(weights.unsqueeze(-1))
        torch.mul(grad, activated, out=grad_up)
        grad_gate.copy_(torch.autograd.grad(activated_with_graph, gate, grad * up)[0])
        return grad_projected, grad_weights, None
