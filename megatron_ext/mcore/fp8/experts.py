"""The routed experts with their matrix products in fp8."""

#   T tokens of this rank, sorted by expert; E experts; K input and N output width of a projection
#   P columns that hold the tokens with each expert's share padded to whole multiples of 16

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from megatron_ext.mcore.fp8.products import grouped_product, product, scale_of_rows
from megatron_ext.mcore.fp8.quantize import E4M3, WHOLE, scale_for
from megatron_ext.mcore.fp8.scaling import Role, Scaling
from megatron_ext.mcore.linear import gradient_sum
from megatron_ext.mcore.moe.experts import GroupedExperts

_ALIGNMENT = 16
"""The grouped kernel contracts over multiples of this many fp8 numbers."""


class _ExpertFunction(torch.autograd.Function):
    """Each expert's `x @ w.T` with all three products in fp8, for all experts of this rank at once.

    Weight gradients in bf16 are added to `sum_ENK` by our own kernel where that is given, as in the other precisions.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, weights_ENK: Tensor, ends_E: Tensor, scaling: Scaling, sum_ENK: Tensor | None = None
    ) -> Tensor:
        ctx.save_for_backward(x_TK, weights_ENK, ends_E)
        # Not saved as an input: it changes between forward and backward, by design.
        ctx.sum = sum_ENK
        ctx.scaling = scaling
        x_max, ctx.x_max = scaling.lasting_maxima(Role.INPUT, x_TK)
        weights, ctx.weights_max = scaling.weight(weights_ENK)
        return grouped_product(scaling.quantize(Role.INPUT, x_TK, x_max), weights, ends_E, x_TK.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, weights_ENK, ends_E = ctx.saved_tensors
        scaling, (needs_x, needs_weights, *_) = ctx.scaling, ctx.needs_input_grad
        grad_TN = grads[0]
        grad_x = grad_weights = None
        # A scale of the whole tensor is that of all tokens; finer ones are of an expert's own.
        grad_max, shared_max = scaling.lasting_maxima(Role.GRADIENT, grad_TN)
        if needs_x:
            weights_EKN = scaling.weight_t(weights_ENK, ctx.weights_max)
            grad = scaling.quantize(Role.GRADIENT, grad_TN, grad_max)
            grad_x = grouped_product(grad, weights_EKN, ends_E, x_TK.dtype, fast=False)
        if needs_weights and ctx.sum is not None and not scaling.precision.fp8_wgrad:
            from megatron_ext.mcore.kernels.grouped_gradient import add_gradients

            add_gradients(ctx.sum, grad_TN, x_TK, ends_E)
        elif needs_weights:
            maxima = shared_max, ctx.x_max
            grad_weights = _weight_gradients(scaling, grad_TN, x_TK, ends_E, weights_ENK.dtype, *maxima)
        return grad_x, grad_weights, None, None, None


def _weight_gradients(
    scaling: Scaling,
    grad_TN: Tensor,
    x_TK: Tensor,
    ends_E: Tensor,
    dtype: torch.dtype,
    grad_max: Tensor | None,
    x_max: Tensor | None,
) -> Tensor:
    """Each expert's `g.T @ x` over its own tokens, [E, N, K]; maxima where all experts share them."""
    if grad_TN.is_cuda:
        if not scaling.precision.fp8_wgrad:
            return F.grouped_mm(grad_TN.t(), x_TK, offs=ends_E)
        return _weight_gradients_cuda(scaling, grad_TN, x_TK, ends_E, dtype, grad_max, x_max)

    def of_expert(grad: Tensor, x: Tensor) -> Tensor:
        if not scaling.precision.fp8_wgrad or len(grad) == 0:
            return grad.t() @ x
        grad_NT = scaling.quantize(Role.GRADIENT, grad.t(), grad_max)
        return product(grad_NT, scaling.quantize(Role.INPUT, x.t(), x_max), dtype, fast=False)

    boundaries = ends_E[:-1].tolist()
    parts = zip(grad_TN.tensor_split(boundaries), x_TK.tensor_split(boundaries), strict=True)
    return torch.stack([of_expert(grad, x) for grad, x in parts])


def _weight_gradients_cuda(
    scaling: Scaling,
    grad_TN: Tensor,
    x_TK: Tensor,
    ends_E: Tensor,
    dtype: torch.dtype,
    grad_max: Tensor | None,
    x_max: Tensor | None,
) -> Tensor:
    grad_NP, grad_scale_EN, padded_ends_E = padded_columns(scaling, Role.GRADIENT, grad_TN, ends_E, grad_max)
    x_KP, x_scale_EK, _ = padded_columns(scaling, Role.INPUT, x_TK, ends_E, x_max)
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


def padded_columns(
    scaling: Scaling, role: Role, x_TN: Tensor, ends_E: Tensor, maxima: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise and transpose tokens for a product that contracts each expert's own tokens, without a host sync.

    Args:
        maxima: `scaling.maxima(role, x_TN)` where it is known, and all experts share it.

    Returns:
        fp8 values [N, P], zero between the experts' shares; scales [E, N], contiguous; where each expert's columns
        end [E], int32.
    """
    tokens, experts = len(x_TN), len(ends_E)
    numbers_T = torch.arange(tokens, device=x_TN.device, dtype=ends_E.dtype)
    expert_T = torch.searchsorted(ends_E, numbers_T, right=True)
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    if scaling.tile(role) == WHOLE:
        quantized = scaling.quantize(role, x_TN, maxima)
        values_TN, scale_EN = quantized.values, scale_of_rows(quantized.scale, experts, x_TN.shape[1])
    else:
        scale_EN = scale_for(_maxima_of_experts(x_TN, counts_E), scaling.dtype(role))
        # A power of two is exact in every floating type, and so is the product.
        inverse_EN = scale_EN.reciprocal().to(x_TN.dtype)
        values_TN = (x_TN * inverse_EN.index_select(0, expert_T)).to(scaling.dtype(role))
    padded_ends_E = ((counts_E + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT).cumsum(0, dtype=torch.int32)
    shift_E = (padded_ends_E - ends_E).roll(1).index_fill_(0, expert_T.new_zeros(1), 0)
    # As many rows as any distribution of the tokens can need: the true number is known on the device only.
    most = (tokens + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT + _ALIGNMENT * experts
    values_PN = torch.zeros(most, x_TN.shape[1], dtype=torch.uint8, device=x_TN.device)
    values_PN.index_copy_(0, (numbers_T + shift_E[expert_T]).long(), values_TN.view(torch.uint8))
    return values_PN.view(values_TN.dtype).t().contiguous(), scale_EN, padded_ends_E


def _maxima_of_experts(x_TN: Tensor, counts_E: Tensor) -> Tensor:
    """The largest magnitude of each column over each expert's own tokens, [E, N] in fp32; 0 without tokens.

    One thread reads the rows of a segment for a column: `index_reduce_` would have all rows of an expert contend
    for the same addresses.
    """
    # Unchecked: a check would wait for the device.
    maxima_EN = torch.segment_reduce(x_TN.abs(), "max", lengths=counts_E.long(), axis=0, unsafe=True, initial=0.0)
    return maxima_EN.float()


class Fp8GroupedExperts(GroupedExperts):
    """Routed experts whose products run in fp8; routing weights and activation stay as they are.

    Gradients are e4m3 whatever `precision.format`: torch has no grouped kernel for e5m2.
    """

    def __init__(self, num_local_experts: int, config: Any, pg_collection: Any, **unused: Any) -> None:
        super().__init__(num_local_experts, config, pg_collection, **unused)
        options = {"gradient_format": E4M3, "triton": config.triton_kernels}
        self.scaling_fc1, self.scaling_fc2 = (Scaling(config.torch_fp8, **options) for _ in range(2))

    def fc1(self, tokens_TH: Tensor, ends_E: Tensor) -> Tensor:
        """Multiply each expert's tokens by its own first weight: [T, F], or [T, 2 F] if gated."""
        return self._scaled_product(tokens_TH, self.weight1, ends_E, self.scaling_fc1)

    def fc2(self, hidden_TF: Tensor, ends_E: Tensor) -> Tensor:
        """Multiply each expert's hidden units by its own second weight: [T, H]."""
        return self._scaled_product(hidden_TF, self.weight2, ends_E, self.scaling_fc2)

    def _scaled_product(self, x: Tensor, weights_ENK: Tensor, ends_E: Tensor, scaling: Scaling) -> Tensor:
        rows_TK, sum_ENK = x.flatten(0, -2), None
        if self.config.triton_kernels:
            sum_ENK = gradient_sum(self.config, weights_ENK)
        output_TN: Tensor = _ExpertFunction.apply(rows_TK, weights_ENK, ends_E, scaling, sum_ENK)
        return output_TN.view(*x.shape[:-1], -1)
