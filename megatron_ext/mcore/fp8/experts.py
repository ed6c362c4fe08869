"""The routed experts with their matrix products in fp8."""

#   T tokens of this rank, sorted by expert; E experts; K input and N output width of a projection
#   P columns that hold the tokens with each expert's share padded to whole multiples of 16

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from megatron_ext.mcore.fp8.products import grouped_product, product, scale_of_rows
from megatron_ext.mcore.fp8.quantize import E4M3, WHOLE, quantize, scale_for
from megatron_ext.mcore.fp8.scaling import Role, Scaling
from megatron_ext.mcore.moe.experts import GroupedExperts

_ALIGNMENT = 16
"""The grouped kernel contracts over multiples of this many fp8 numbers."""


class _ExpertFunction(torch.autograd.Function):
    """Each expert's `x @ w.T` with all three products in fp8, for all experts of this rank at once."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weights_ENK: Tensor, ends_E: Tensor, scaling: Scaling) -> Tensor:
        ctx.save_for_backward(x_TK, weights_ENK, ends_E)
        ctx.scaling = scaling
        x, weights = scaling.quantize(Role.INPUT, x_TK), scaling.quantize(Role.WEIGHT, weights_ENK)
        return grouped_product(x, weights, ends_E, x_TK.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, weights_ENK, ends_E = ctx.saved_tensors
        scaling, (needs_x, needs_weights, *_) = ctx.scaling, ctx.needs_input_grad
        grad_TN = grads[0]
        grad_x = grad_weights = None
        if needs_x:
            weights_EKN = scaling.quantize(Role.WEIGHT, weights_ENK.transpose(1, 2))
            grad_x = grouped_product(
                scaling.quantize(Role.GRADIENT, grad_TN), weights_EKN, ends_E, x_TK.dtype, fast=False
            )
        if needs_weights:
            grad_weights = _weight_gradients(scaling, grad_TN, x_TK, ends_E, weights_ENK.dtype)
        return grad_x, grad_weights, None, None


def _weight_gradients(scaling: Scaling, grad_TN: Tensor, x_TK: Tensor, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Each expert's `g.T @ x` over its own tokens, [E, N, K]."""
    if grad_TN.is_cuda:
        if not scaling.precision.fp8_wgrad:
            return F.grouped_mm(grad_TN.t(), x_TK, offs=ends_E)
        return _weight_gradients_cuda(scaling, grad_TN, x_TK, ends_E, dtype)
    # A scale of the whole tensor is that of all tokens; finer ones are of an expert's own.
    shared = scaling.precision.fp8_wgrad and scaling.tile(Role.INPUT) == WHOLE
    grad_max = scaling.maxima(Role.GRADIENT, grad_TN) if shared else None
    x_max = scaling.maxima(Role.INPUT, x_TK) if shared else None

    def of_expert(grad: Tensor, x: Tensor) -> Tensor:
        if not scaling.precision.fp8_wgrad or len(grad) == 0:
            return grad.t() @ x
        grad_NT = scaling.quantize(Role.GRADIENT, grad.t(), grad_max)
        return product(grad_NT, scaling.quantize(Role.INPUT, x.t(), x_max), dtype, fast=False)

    boundaries = ends_E[:-1].tolist()
    parts = zip(grad_TN.tensor_split(boundaries), x_TK.tensor_split(boundaries), strict=True)
    return torch.stack([of_expert(grad, x) for grad, x in parts])


def _weight_gradients_cuda(
    scaling: Scaling, grad_TN: Tensor, x_TK: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    grad_NP, grad_scale_EN, padded_ends_E = padded_columns(scaling, Role.GRADIENT, grad_TN, ends_E)
    x_KP, x_scale_EK, _ = padded_columns(scaling, Role.INPUT, x_TK, ends_E)
    return F.scaled_grouped_mm(  # type: ignore[attr-defined]
        grad_NP,
        x_KP.t(),
        grad_scale_EN.reshape(-1),
        ScalingType.RowWise,
        x_scale_EK.reshape(-1),
        ScalingType.RowWise,
        offs=padded_ends_E,
        output_dtype=dtype,
    )


def padded_columns(scaling: Scaling, role: Role, x_TN: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise and transpose tokens for a product that contracts each expert's own tokens, without a host sync.

    Returns:
        fp8 values [N, P], zero between the experts' shares; scales [E, N], contiguous; where each expert's columns
        end [E], int32.
    """
    tokens, experts = len(x_TN), len(ends_E)
    numbers_T = torch.arange(tokens, device=x_TN.device, dtype=ends_E.dtype)
    expert_T = torch.searchsorted(ends_E, numbers_T, right=True)
    if scaling.tile(role) == WHOLE:
        quantized = scaling.quantize(role, x_TN)
        scale_EN = scale_of_rows(quantized.scale, experts, x_TN.shape[1])
    else:
        maxima_EN = x_TN.new_zeros(experts, x_TN.shape[1]).index_reduce_(0, expert_T, x_TN.abs(), "amax").float()
        quantized = quantize(x_TN, scaling.dtype(role), (1, 1), maxima_EN[expert_T])
        scale_EN = scale_for(maxima_EN, scaling.dtype(role))
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    padded_ends_E = ((counts_E + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT).cumsum(0, dtype=torch.int32)
    shift_E = (padded_ends_E - ends_E).roll(1).index_fill_(0, expert_T.new_zeros(1), 0)
    # As many rows as any distribution of the tokens can need: the true number is known on the device only.
    most = (tokens + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT + _ALIGNMENT * experts
    values_PN = torch.zeros(most, x_TN.shape[1], dtype=torch.uint8, device=x_TN.device)
    values_PN.index_copy_(0, (numbers_T + shift_E[expert_T]).long(), quantized.values.view(torch.uint8))
    return values_PN.view(quantized.values.dtype).t().contiguous(), scale_EN, padded_ends_E


class Fp8GroupedExperts(GroupedExperts):
    """Routed experts whose products run in fp8; routing weights and activation stay as they are.

    Gradients are e4m3 whatever `precision.format`: torch has no grouped kernel for e5m2.
    """

    def __init__(self, num_local_experts: int, config: Any, pg_collection: Any, **unused: Any) -> None:
        super().__init__(num_local_experts, config, pg_collection, **unused)
        self.scaling_fc1 = Scaling(config.torch_fp8, gradient_format=E4M3)
        self.scaling_fc2 = Scaling(config.torch_fp8, gradient_format=E4M3)

    def fc1(self, tokens_TH: Tensor, ends_E: Tensor) -> Tensor:
        """Multiply each expert's tokens by its own first weight: [T, F], or [T, 2 F] if gated."""
        projected: Tensor = _ExpertFunction.apply(tokens_TH, self.weight1, ends_E, self.scaling_fc1)
        return projected

    def fc2(self, hidden_TF: Tensor, ends_E: Tensor) -> Tensor:
        """Multiply each expert's hidden units by its own second weight: [T, H]."""
        output_TH: Tensor = _ExpertFunction.apply(hidden_TF, self.weight2, ends_E, self.scaling_fc2)
        return output_TH
