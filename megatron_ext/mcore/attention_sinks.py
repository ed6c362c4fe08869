"""Attention with sinks: a learned logit of each head joins the softmax and has no value.

    p_ij = exp(s_ij) / (exp(sink) + sum_k exp(s_ik))        o_i = sum_j p_ij v_j

With L_i, the log-sum-exp of a query's scores, o_i is the output of plain attention times exp(L_i - L'_i), where L'_i =
log(exp(L_i) + exp(sink)). So any kernel that gives out L_i computes it. Its own backward pass computes
dS_ij = exp(s_ij - L_i) (dO_i v_j - dO_i o_i) from an output and a log-sum-exp (FlashAttention-2, arXiv 2307.08691,
section 3.1): given o_i and L'_i it returns the right gradients as it is, and that of the sink is
-sum_i exp(sink - L'_i) dO_i o_i.
"""

#   N query heads, G key/value heads, R query heads of each, D head width
#   Q packed queries of the rank or those of a block, K packed keys or those that the block sees

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class KernelCall:
    """What FlashAttention is told of its segments and of what they see."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    most_queries: int
    most_keys: int
    window: tuple[int, int]
    scale: float


def visible_keys(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which of `keys` keys each of `queries` queries sees, [Q, K]: the last query is that of the last key."""
    last = keys - queries
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(last)
    return visible if window is None else visible.triu(last - window + 1)


def attend_with_sinks(
    query_NQD: Tensor, key_GKD: Tensor, value_GKD: Tensor, sinks_N: Tensor, window: int | None, scale: float
) -> Tensor:
    """The context [N, Q, D] of a block of queries, the last of which is that of the last key, on any device.

    By torch's own products. The block's scores and mask are computed again in the backward pass, so none are kept. Sums
    are in fp32 or wider.
    """
    queries, width = query_NQD.shape[1:]
    query_GRQD, sinks_GR = (x.unflatten(0, (key_GKD.shape[0], -1)) for x in (query_NQD, sinks_N))
    context_GRQD: Tensor = _Block.apply(query_GRQD, key_GKD, value_GKD, sinks_GR, window, scale)
    return context_GRQD.reshape(-1, queries, width)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_GRQD: Tensor,
        key_GKD: Tensor,
        value_GKD: Tensor,
        sinks_GR: Tensor,
        window: int | None,
        scale: float,
    ) -> Tensor:
        query, key, value, sinks = (_wide(x) for x in (query_GRQD, key_GKD, value_GKD, sinks_GR))
        scores_GRQK = _scores(query, key, window, scale)
        sums_GRQ = torch.logaddexp(scores_GRQK.logsumexp(-1), sinks[..., None])
        context_GRQD = (scores_GRQK - sums_GRQ[..., None]).exp() @ value[:, None]
        context_GRQD = context_GRQD.to(query_GRQD.dtype)
        ctx.save_for_backward(query_GRQD, key_GKD, value_GKD, sinks_GR, context_GRQD, sums_GRQ)
        ctx.window, ctx.scale = window, scale
        return context_GRQD

    @staticmethod
    def backward(ctx: Any, gradient_GRQD: Tensor) -> tuple[Tensor | None, ...]:
        *kept, context_GRQD, sums_GRQ = ctx.saved_tensors
        query, key, value, sinks = (_wide(x) for x in kept)
        gradient = _wide(gradient_GRQD)
        weights_GRQK = (_scores(query, key, ctx.window, ctx.scale) - sums_GRQ[..., None]).exp()
        given_GRQ = (gradient * context_GRQD).sum(-1)
        of_scores_GRQK = weights_GRQK * (gradient @ value[:, None].mT - given_GRQ[..., None])
        gradients = (
            of_scores_GRQK @ key[:, None] * ctx.scale,
            (of_scores_GRQK.mT @ query).sum(1) * ctx.scale,
            (weights_GRQK.mT @ gradient).sum(1),
            -((sinks[..., None] - sums_GRQ).exp() * given_GRQ).sum(-1),
        )
        return *(g.to(x.dtype) for g, x in zip(gradients, kept, strict=True)), None, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scores(query_GRQD: Tensor, key_GKD: Tensor, window: int | None, scale: float) -> Tensor:
    visible_QK = visible_keys(query_GRQD.shape[2], key_GKD.shape[1], window, key_GKD.device)
    return (query_GRQD @ key_GKD[:, None].mT * scale).masked_fill(~visible_QK, -torch.inf)


def flash_attend_with_sinks(
    query_QND: Tensor, key_KGD: Tensor, value_KGD: Tensor, sinks_N: Tensor, call: KernelCall
) -> Tensor:
    """The context [Q, N, D] of all segments at once, by torch's FlashAttention."""
    context_QND: Tensor = _Flash.apply(query_QND, key_KGD, value_KGD, sinks_N, call)
    return context_QND


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_QND: Tensor, key_KGD: Tensor, value_KGD: Tensor, sinks_N: Tensor, call: KernelCall
    ) -> Tensor:
        plain_QND, sums_NQ = flash_forward(query_QND, key_KGD, value_KGD, call)
        joined_NQ = torch.logaddexp(sums_NQ, sinks_N.float()[:, None])
        context_QND = (plain_QND * (sums_NQ - joined_NQ).exp().t()[..., None]).to(query_QND.dtype)
        ctx.save_for_backward(query_QND, key_KGD, value_KGD, sinks_N, context_QND, joined_NQ)
        ctx.call = call
        return context_QND

    @staticmethod
    def backward(ctx: Any, gradient_QND: Tensor) -> tuple[Tensor | None, ...]:
        query_QND, key_KGD, value_KGD, sinks_N, context_QND, joined_NQ = ctx.saved_tensors
        gradients = flash_backward(
            gradient_QND.contiguous(), query_QND, key_KGD, value_KGD, context_QND, joined_NQ, ctx.call
        )
        given_NQ = (gradient_QND.float() * context_QND).sum(-1).t()
        of_sinks_N = -((sinks_N.float()[:, None] - joined_NQ).exp() * given_NQ).sum(-1)
        return *gradients, of_sinks_N.to(sinks_N.dtype), None


def flash_forward(query_QND: Tensor, key_KGD: Tensor, value_KGD: Tensor, call: KernelCall) -> tuple[Tensor, Tensor]:
    """FlashAttention's output [Q, N, D] and its log-sum-exp [N, Q] in fp32.

    torch's public function has no backward pass to which another log-sum-exp can be given.
    """
    left, right = call.window
    output, sums, *_ = torch.ops.aten._flash_attention_forward(
        query_QND,
        key_KGD,
        value_KGD,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.most_queries,
        call.most_keys,
        0.0,
        left < 0,
        False,
        scale=call.scale,
        window_size_left=left,
        window_size_right=right,
    )
    return output, sums


def flash_backward(
    gradient_QND: Tensor,
    query_QND: Tensor,
    key_KGD: Tensor,
    value_KGD: Tensor,
    output_QND: Tensor,
    sums_NQ: Tensor,
    call: KernelCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values by FlashAttention, for this output and these log-sum-exps."""
    left, right = call.window
    no_random_state = torch.zeros(2, dtype=torch.uint64, device=query_QND.device)
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        gradient_QND,
        query_QND,
        key_KGD,
        value_KGD,
        output_QND,
        sums_NQ,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.most_queries,
        call.most_keys,
        0.0,
        left < 0,
        no_random_state,
        query_QND.new_empty(0),
        scale=call.scale,
        window_size_left=left,
        window_size_right=right,
    )
    return gradients
