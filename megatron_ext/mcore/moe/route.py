"""From a router's logits to all that follows from them on one rank: a pure function, which compiles to one graph."""

#   T tokens, E experts, K experts a token

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_ext.config import ModelConfig
from megatron_ext.mcore.moe import balance
from megatron_ext.mcore.moe.counts import shape_sums
from megatron_ext.mcore.moe.selection import choose, normalize_gating_logits, probabilities_of, scores_of, weights_of


class Routed(NamedTuple):
    """Where tokens go, and what losses and counts are made of; those are None in a pass that trains nothing."""

    weights_TE: Tensor
    """In fp32, zero where a token does not go."""
    chosen_TE: Tensor
    """Whether a token goes to an expert, before any capacity."""
    load_E: Tensor | None
    """Tokens of each expert."""
    shape: Tensor | None
    """What is counted of the gate's distribution without noise (`shape_sums`)."""
    probabilities_TE: Tensor | None
    """The gate's distribution, with noise: what balance losses are of."""
    balanced_TE: Tensor | None
    """What the gate chooses by itself, without a bias: what balance losses count."""
    z_loss: Tensor | None
    """Of this rank's tokens."""


def route(
    raw_TE: Tensor,
    noise_TE: Tensor | None,
    bias_E: Tensor | None,
    model: ModelConfig,
    splits: int,
    *,
    learns: bool,
    balances: bool,
) -> Routed:
    """Choose each token's experts. No shape depends on numbers, nothing is read from the device, nothing is changed.

    Args:
        raw_TE: logits of the gate, in fp32.
        noise_TE: what is added to the normalized logits, where anything is drawn.
        bias_E: the expert bias.
        splits: ranks that have different tokens of the same sequences.
        learns: also return what losses and counts are made of,
        balances: and what balance losses are made of.
    """
    logits_TE = raw_TE
    if model.moe_gating_normalization is not None:
        logits_TE = normalize_gating_logits(raw_TE, model.moe_gating_normalization)
    noisy_TE = logits_TE if noise_TE is None else logits_TE + noise_TE
    scores_TE = scores_of(noisy_TE, model)
    experts_TK = choose(noisy_TE, scores_TE, model, bias_E)
    weights_TK = weights_of(noisy_TE, scores_TE, experts_TK, model)
    weights_TE = torch.zeros_like(noisy_TE).scatter(1, experts_TK, weights_TK)
    chosen_TE = _marked(noisy_TE, experts_TK)
    if not learns:
        return Routed(weights_TE, chosen_TE, None, None, None, None, None)
    plain_TE = scores_TE.detach() if noise_TE is None else scores_of(logits_TE.detach(), model)
    probabilities_TE = balanced_TE = None
    if balances:
        probabilities_TE, balanced_TE = probabilities_of(scores_TE, model), chosen_TE
        if bias_E is not None:
            # The bias balances by itself; losses are of what the gate alone would choose (DeepSeek-V3, eq. 18).
            balanced_TE = _marked(noisy_TE, choose(noisy_TE, scores_TE, model, None))
    return Routed(
        weights_TE,
        chosen_TE,
        load_E=chosen_TE.sum(dim=0),
        shape=shape_sums(probabilities_of(plain_TE, model)),
        probabilities_TE=probabilities_TE,
        balanced_TE=balanced_TE,
        z_loss=balance.z_loss(raw_TE, splits) if model.moe_z_loss_coeff else None,
    )


def route_in_one_graph(raw_TE: Tensor, noise_TE: Tensor | None, *rest: Any, **options: Any) -> Routed:
    """What `route` returns, by the kernels that torch.compile makes of it: one graph, whatever the number of tokens.

    The last bits differ: exponentials are those of the compiler's library, and sums are in another order.
    """
    for tensor_TE in (raw_TE, noise_TE):
        if tensor_TE is not None:
            torch._dynamo.maybe_mark_dynamic(tensor_TE, 0)
    routed: Routed = _compiled()(raw_TE, noise_TE, *rest, **options)
    return routed


@functools.cache
def _compiled() -> Callable[..., Routed]:
    """Made at the first call: the compiler takes seconds to import."""
    # Training, recompute, evaluation and references have a graph each, and each model of a process.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(route, fullgraph=True)


def _marked(like_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Whether a token goes to an expert [T, E]."""
    return torch.zeros_like(like_TE, dtype=torch.bool).scatter(1, experts_TK, True)
