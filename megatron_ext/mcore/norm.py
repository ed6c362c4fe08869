"""RMSNorm and LayerNorm in plain PyTorch that work under sequence parallelism."""

#   H normalised width

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the mark that makes megatron-core sum its weight's gradient over the TP group.

    Under sequence parallelism each TP rank normalises its own part of the sequence, so each has only a part of the
    gradient. megatron-core's own wrapper around torch norms refuses that case.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, device=torch.get_default_device(), dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` [..., H] over its root mean square, times the weight; in the dtype of `x`."""
        if x.device.type != "cpu":
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)  # one fused kernel
        assert self.eps is not None
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


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm (with bias) with the same mark on both parameters."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, device=torch.get_default_device(), dtype=config.params_dtype)
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
