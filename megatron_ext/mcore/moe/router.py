"""The router: gating in fp32, gating-logit normalization, and the counts that MoE health is read from."""

#   T tokens of this rank, E experts, H hidden, S sequence, B micro-batch

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_ext.config import GatingNormalization


def normalize_gating_logits(logits: Tensor, normalization: GatingNormalization) -> Tensor:
    """Standardise each token's logits over the experts and scale them.

    Skywork-MoE (arXiv 2406.06563), section 4.1, eq. 6: `scale * (z - mean(z)) / (std(z) + eps)`; with a sample
    standard deviation and eps 1e-5 this is Tanuki-8x8B's gate.

    Args:
        logits: [..., experts], in fp32.

    Returns:
        The same shape and dtype. Tokens whose logits are all equal have no direction and give zeros.
    """
    centred = logits - logits.mean(dim=-1, keepdim=True)
    deviation = logits.std(dim=-1, correction=normalization.correction, keepdim=True)
    return normalization.scale * centred / (deviation + normalization.eps)


class _GatingLinear(torch.autograd.Function):
    """`input @ weight.T` computed in fp32, keeping the input for the backward pass in the dtype it came in.

    megatron-core 0.16 has the same function but fails with NameError where Transformer Engine is not installed.
    """

    @staticmethod
    def forward(ctx: Any, tokens_TH: Tensor, weight_EH: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_TH, weight_EH)
        return tokens_TH.float() @ weight_EH.float().t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        tokens_TH, weight_EH = ctx.saved_tensors
        (grad_TE,) = grads
        grad_tokens = (grad_TE @ weight_EH.float()).to(tokens_TH.dtype)
        return grad_tokens, (grad_TE.t() @ tokens_TH.float()).to(weight_EH.dtype)


class Router(TopKRouter):
    """megatron-core's top-k router with fp32 gating, gating-logit normalization and load counts.

    Attributes:
        load: [E] tokens sent to each expert by this rank since `reset_statistics`, training passes only.
        balance_loss: balance loss divided by its coefficient, summed over this rank's share of each micro-batch.
    """

    def __init__(self, *, normalization: GatingNormalization | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bias = None  # add_bias_linear gives megatron-core's router one
        self.normalization = normalization
        # Plain attributes, not buffers: statistics belong to no checkpoint, and converting the model's dtype must
        # not round them.
        self.load: Tensor | None = None
        self.balance_loss: Tensor | None = None

    def gating(self, input: Tensor) -> Tensor:  # noqa: A002 - megatron-core's parameter name
        """Return the logits [S, B, E] in fp32, normalized if so configured."""
        hidden = input.reshape(-1, input.shape[-1])
        logits: Tensor = _GatingLinear.apply(hidden, self.weight)
        if self.normalization is not None:
            logits = normalize_gating_logits(logits, self.normalization)
        return logits.view(*input.shape[:-1], -1)

    def routing(self, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Select experts as megatron-core does, and count what was selected."""
        weights_TE, chosen_TE = super().routing(logits, *args, **kwargs)
        # Under full recompute the first pass runs without gradients; counting only with them counts each token once.
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                counts = chosen_TE.sum(dim=0)
                self.load = counts if self.load is None else self.load + counts
        return weights_TE, chosen_TE

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Attach the loss as megatron-core does, and sum its unweighted value for the log."""
        value = aux_loss.detach() / aux_loss_coeff
        self.balance_loss = value if self.balance_loss is None else self.balance_loss + value
        return super().attach_and_log_load_balancing_loss(activation, aux_loss_coeff, aux_loss, *args, **kwargs)

    def reset_statistics(self) -> None:
        """Start counting anew."""
        self.load = self.balance_loss = None
