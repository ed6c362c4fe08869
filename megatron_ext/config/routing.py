"""How a router turns hidden states into a choice of experts, and what keeps the experts balanced."""

import math
from typing import Annotated, Literal

from pydantic import Field

from megatron_ext.config.base import config
from megatron_ext.config.effect import shapes_function, shapes_weights, training_only


@config
class GatingNormalization:
    """Gating-logit normalization (Skywork-MoE, arXiv 2406.06563, section 4.1, eq. 6; Tanuki-8x8B).

    Each token's E router logits z become `scale * (z - mean(z)) / (std(z) + eps)` before the score function, in
    training and in inference.
    """

    scale: float = shapes_function(default=1.0, gt=0)
    """The paper's lambda: how sharp the normalized distribution is."""
    eps: float = shapes_function(default=1e-5, gt=0)
    """Added to the standard deviation."""
    correction: Literal[0, 1] = shapes_function(default=1)
    """1: sample standard deviation (Skywork's and Tanuki's code); 0: population standard deviation."""


@config
class GumbelNoise:
    """Standard Gumbel noise on the logits, so that selection samples from the gate's distribution (JINIAC)."""

    kind: Literal["gumbel"] = training_only()
    scale: float = training_only(default=1.0, gt=0)
    """Factor on the noise."""


@config
class LearnedNoise:
    """Noisy top-k gating (Shazeer et al. 2017, arXiv 1701.06538, eq. 4): logits + N(0, 1) * softplus(x W_noise).

    W_noise [experts, hidden] is trained with the model and used in training only; it starts at zero.
    """

    kind: Literal["learned"] = shapes_weights()


@config
class InputJitter:
    """The router's input is multiplied by numbers drawn evenly from 1 - eps to 1 + eps (Switch Transformer)."""

    kind: Literal["input_jitter"] = training_only()
    eps: float = training_only(default=1e-2, gt=0, lt=1)
    """Largest relative change."""


RouterNoise = Annotated[GumbelNoise | LearnedNoise | InputJitter, Field(discriminator="kind")]


@config
class AdaptiveAuxLoss:
    """Adaptive balance-loss coefficients, one a layer (Skywork-MoE, arXiv 2406.06563, section 4.2, eqs. 7-9).

    After each step a layer's coefficient a becomes `beta * a + (1 - beta) * min(xi * d, alpha_max)`, with d its rate of
    dropped assignments. Without a capacity nothing is dropped; d is then what `proxy_capacity_factor` would drop.
    """

    xi: float = training_only(default=0.2, gt=0)
    """How fast the target rises with the drop rate."""
    alpha_max: float = training_only(default=0.01, gt=0)
    """Largest coefficient."""
    beta: float = training_only(default=0.99, ge=0, lt=1)
    """Share of the old coefficient that is kept each step."""
    proxy_capacity_factor: float = training_only(default=1.0, gt=0)
    """Capacity factor that d is measured against where `model.moe_expert_capacity_factor` is unset."""


BalanceLoss = Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "none"]
DropPolicy = Literal["probs", "position"]


def expert_capacity(factor: float, tokens: int, topk: int, experts: int) -> int:
    """How many of a micro-batch's tokens an expert takes at most (GShard, arXiv 2006.16668)."""
    return min(math.ceil(tokens * topk / experts * factor), tokens)
