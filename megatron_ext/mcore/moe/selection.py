"""From logits to the experts of each token and their weights: the score functions and selection rules of the field."""

#   T tokens, E experts, K experts a token is sent to, G groups of experts

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.config import GatingNormalization, ModelConfig
from megatron_ext.config.routing import expert_capacity


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


def scores_of(logits_TE: Tensor, model: ModelConfig) -> Tensor:
    """Each token's score of each expert [T, E]: softmax over all experts, or the sigmoid of each."""
    return logits_TE.sigmoid() if model.moe_router_score_function == "sigmoid" else logits_TE.softmax(dim=-1)


def probabilities_of(scores_TE: Tensor, model: ModelConfig) -> Tensor:
    """Scores as a distribution over the experts [T, E] (for sigmoid, DeepSeek-V3, arXiv 2412.19437, eq. 19)."""
    if model.moe_router_score_function == "sigmoid":
        return scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + _TINY)
    return scores_TE


@torch.no_grad()
def choose(logits_TE: Tensor, scores_TE: Tensor, model: ModelConfig, bias_E: Tensor | None) -> Tensor:
    """The experts of each token [T, K].

    Those with the highest scores, or scores plus `bias_E` (DeepSeek-V3, section 2.1.2: the bias selects, it does not
    weigh); with groups, only experts of the best `moe_router_group_topk` groups (DeepSeek-V2, arXiv 2405.04434,
    section 2.2.2).
    """
    # Logits order experts as their scores do, without the ties that rounding makes of very small probabilities.
    choice_TE = logits_TE if bias_E is None and model.moe_router_num_groups is None else scores_TE
    if bias_E is not None:
        choice_TE = choice_TE + bias_E
    if model.moe_router_num_groups is not None:
        choice_TE = choice_TE.masked_fill(~_in_best_groups(choice_TE, model), -math.inf)
    return choice_TE.topk(model.moe_router_topk, dim=-1).indices


def _in_best_groups(choice_TE: Tensor, model: ModelConfig) -> Tensor:
    """Whether each expert belongs to one of the token's best groups [T, E]."""
    assert model.moe_router_num_groups is not None
    assert model.moe_router_group_topk is not None
    members = choice_TE.unflatten(-1, (model.moe_router_num_groups, -1))
    if model.moe_router_group_score == "top2_sum":
        worth_TG = members.topk(2, dim=-1).values.sum(dim=-1)
    else:
        worth_TG = members.amax(dim=-1)
    best = worth_TG.topk(model.moe_router_group_topk, dim=-1).indices
    allowed_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter_(1, best, True)
    return allowed_TG.unsqueeze(-1).expand_as(members).flatten(1)


def weights_of(logits_TE: Tensor, scores_TE: Tensor, experts_TK: Tensor, model: ModelConfig) -> Tensor:
    """The weights of each token's experts [T, K]."""
    if model.moe_router_score_function == "softmax" and not model.moe_router_pre_softmax:
        weights_TK = logits_TE.gather(1, experts_TK).softmax(dim=-1)
    else:
        weights_TK = scores_TE.gather(1, experts_TK)
        if model.normalizes_topk:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + _TINY)
    if model.moe_router_topk_scaling_factor is not None:
        weights_TK = weights_TK * model.moe_router_topk_scaling_factor
    return weights_TK


_TINY = 1e-20
"""Keeps the sum of sigmoid scores away from zero; DeepSeek's and megatron-core's value."""


@dataclass(frozen=True)
class Capacity:
    """How many tokens of a micro-batch an expert takes, and which ones go first."""

    factor: float
    policy: str
    """probs: tokens with the largest weights; position: the first ones."""

    def kept(self, weights_TE: Tensor, chosen_TE: Tensor, topk: int) -> Tensor:
        """Which assignments stay [T, E], given all tokens of the micro-batch in the order of their positions."""
        tokens, experts = chosen_TE.shape
        places = expert_capacity(self.factor, tokens, topk, experts)
        if self.policy == "position":
            return chosen_TE & (chosen_TE.cumsum(dim=0) <= places)
        first = weights_TE.masked_fill(~chosen_TE, -1.0).topk(places, dim=0).indices
        return chosen_TE & torch.zeros_like(chosen_TE).scatter_(0, first, True)
