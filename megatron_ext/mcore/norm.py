"""RMSNorm and LayerNorm in plain PyTorch: under sequence parallelism, and in one step with the sum before them."""

#   H normalised width

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class _AfterSum:
    """A norm that can be taken in one step with the residual sum before it (mcore/kernels/sum_norm.py).

    megatron-core's layers make the sum and take its norm later, from the sum: what was computed with it waits here.
    """

    _waiting: tuple[Tensor, Tensor] | None = None
    """A sum and its norm."""

    def _sum(self, x: Tensor, residual: Tensor, weight_H: Tensor, bias_H: Tensor | None, epsilon: float) -> Tensor:
        from megatron_ext.mcore.kernels.sum_norm import sum_norm

        self._waiting = sum_norm(x, residual, weight_H, bias_H, epsilon)
        return self._waiting[0]

    def _known(self, x: Tensor) -> Tensor | None:
        """The norm of `x`, where that is the sum made last."""
        if self._waiting is None:
            return None
        (total, normalized), self._waiting = self._waiting, None
        return normalized if total is x else None


class RMSNorm(_AfterSum, torch.nn.RMSNorm):
    """torch's RMSNorm with the mark that makes megatron-core sum its weight's gradient over the TP group.

    Under sequence parallelism each TP rank normalises its own part of the sequence, so each has only a part of the
    gradient. megatron-core's own wrapper around torch norms refuses that case.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, device=torch.get_default_device(), dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return `x` [..., H] over its root mean square, times the weight; in the dtype of `x`.

        Args:
            residual: then return `x + residual`, of which the next call returns the norm.
        """
        assert self.eps is not None
        if residual is not None:
            return self._sum(x, residual, self.weight, None, self.eps)
        if (known := self._known(x)) is not None:
            return known
        if x.device.type != "cpu":
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)  # one fused kernel
        normalized: Tensor = _CpuRmsNorm.apply(x, self.weight, self.eps)
        return normalized


class _CpuRmsNorm(torch.autograd.Function):
    """torch takes its CPU norm apart into elementwise steps and keeps what is between them; this keeps its input only.

    With r = (mean(x^2) + eps)^-1/2 and n = x r: dL/dw = sum(g n), dL/dx = r (g w - n mean(g w n)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_H, scale)
        return (x * scale).mul_(weight_H).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_H, scale = ctx.saved_tensors
        normalized = x * scale  # fp32
        grad_weight = (normalized * grads[0]).view(-1, x.shape[-1]).sum(dim=0)
        grad = grads[0].float() * weight_H
        projection = torch.linalg.vecdot(grad, normalized).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = grad.sub_(normalized.mul_(projection)).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight_H.dtype), None


class LayerNorm(_AfterSum, torch.nn.LayerNorm):
    """torch's LayerNorm (with bias) with the same mark on both parameters."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, device=torch.get_default_device(), dtype=config.params_dtype)
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the norm of `x`; with `residual` see RMSNorm."""
        if residual is not None:
            return self._sum(x, residual, self.weight, self.bias, self.eps)
        known = self._known(x)
        return super().forward(x) if known is None else known


class SumBeforeNorm:
    """What megatron-core calls for the residual sum before `norm`, in one step with that norm."""

    def __init__(self, norm: RMSNorm | LayerNorm) -> None:
        self._norm = norm

    def __call__(self, training: bool, fused: bool) -> Any:
        """See megatron-core's get_bias_dropout_add; there is no dropout."""
        return self._sum

    def _sum(self, x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        x, bias = x_with_bias
        x = x if bias is None else x + bias
        # By a call of the module: where weights are gathered late, that is what waits for them.
        total: Tensor = self._norm(x, residual.to(x.dtype))
        return total
