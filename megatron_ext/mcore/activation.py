"""Gated activations (SwiGLU and its kin) as one autograd step that keeps nothing but its input."""

#   F width of the feed-forward network

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
QUICK_GELU_SLOPE = 1.702


def quick_gelu(x: Tensor) -> Tensor:
    """`x sigmoid(1.702 x)`, the approximation of GELU by a sigmoid (arXiv 1606.08415, section 2)."""
    return x * torch.sigmoid(QUICK_GELU_SLOPE * x)


SLOPES: dict[Activation, float] = {F.silu: 1.0, quick_gelu: QUICK_GELU_SLOPE}
"""Activations of the form `x sigmoid(slope x)`, which the Triton kernel computes."""


@dataclass(frozen=True)
class Gate:
    """What a gated network makes of its halves: `activation(min(gate, limit)) * (clamp(up, -limit, limit) + offset)`.

    Limit and offset are those of gpt-oss (`GptOssExperts` of transformers; 7 and 1 there). Beyond the limit the
    gradient is 0, at it as below: that of `clamp` there differs between versions of torch (1 until 2.13, then 0).
    """

    activation: Activation
    limit: float | None = None
    offset: float = 0.0

    def cut(self, gate: Tensor) -> Tensor:
        """The gate below the limit."""
        return gate if self.limit is None else gate.clamp(max=self.limit)

    def linear(self, up: Tensor) -> Tensor:
        """The factor that the activated gate is multiplied by."""
        up = up if self.limit is None else up.clamp(-self.limit, self.limit)
        return up if self.offset == 0.0 else up + self.offset


def gate_of(config: Any) -> Gate:
    """The gate of megatron-core's configuration."""
    return Gate(config.activation_func, config.activation_func_clamp_value, config.glu_linear_offset)


def gated_activation(projected: Tensor, kind: Gate, weights: Tensor | None = None, *, triton: bool = False) -> Tensor:
    """Return what `kind` makes of the halves gate and up of the last dimension, times `weights`.

    Plain autograd would keep the activated gate and each product for the backward pass; here they are computed again
    from `projected`, which is cheap beside the matrix products around it.

    Args:
        projected: [..., 2 F], gate before up.
        weights: [...], one factor a row (routing weights), of any floating dtype.
        triton: by our own kernel where it has the activation (SLOPES; mcore/kernels/swiglu.py).

    Returns:
        [..., F] in the dtype of `projected`.
    """
    if triton and kind.activation in SLOPES:
        from megatron_ext.mcore.kernels.swiglu import swiglu

        return swiglu(projected, weights, slope=SLOPES[kind.activation], limit=kind.limit, offset=kind.offset)
    output: Tensor = _GatedActivation.apply(projected, weights, kind)
    return output


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, weights: Tensor | None, kind: Gate) -> Tensor:
        ctx.save_for_backward(projected, weights)
        ctx.kind = kind
        gate, up = projected.chunk(2, dim=-1)
        output = kind.activation(kind.cut(gate)).mul_(kind.linear(up))
        return output if weights is None else output.mul_(weights.unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        projected, weights = ctx.saved_tensors
        kind: Gate = ctx.kind
        gate, up = projected.chunk(2, dim=-1)
        linear = kind.linear(up)
        cut = kind.cut(gate).detach().requires_grad_()
        with torch.enable_grad():
            activated_with_graph = kind.activation(cut)
        activated = activated_with_graph.detach()
        grad_projected = torch.empty_like(projected)
        grad_gate, grad_up = grad_projected.chunk(2, dim=-1)
        grad, grad_weights = grads[0], None
        if weights is not None:
            unweighted = torch.mul(activated, linear, out=grad_up)  # its place is free until the gradient is there
            grad_weights = unweighted.mul_(grad).sum(dim=-1, dtype=torch.float32).to(weights.dtype)
            grad = grad.clone().mul_(weights.unsqueeze(-1))
        torch.mul(grad, activated, out=grad_up)
        grad_gate.copy_(torch.autograd.grad(activated_with_graph, cut, grad * linear)[0])
        if kind.limit is not None:
            grad_up.mul_(up.abs() <= kind.limit)
            grad_gate.mul_(gate <= kind.limit)
        return grad_projected, grad_weights, None
