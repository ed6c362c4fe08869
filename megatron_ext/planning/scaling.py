"""What papers say of tokens, learning rate and batch for a model and a budget, and of upcycling beside other ways.

Laws are fitted to small models on English text: use them to see how far from usual a plan is, not for its last digit.
"""

import math
from dataclasses import dataclass

TOKENS_A_PARAMETER = 20
"""Compute-optimal (Hoffmann et al. 2022, arXiv 2203.15556, table 3): more train a smaller model beyond its optimum."""


@dataclass(frozen=True)
class Optimum:
    """Where a budget of training FLOPs gives the lowest loss."""

    parameters: float
    tokens: float


def compute_optimum(flops: float) -> Optimum:
    """Parameters and tokens of a dense model for `flops`, with 6 N D of them and D = 20 N."""
    parameters = math.sqrt(flops / (6 * TOKENS_A_PARAMETER))
    return Optimum(parameters, TOKENS_A_PARAMETER * parameters)


@dataclass(frozen=True)
class Suggestion:
    """Peak learning rate and tokens of a global batch."""

    source: str
    learning_rate: float
    batch_tokens: float


def suggestions(parameters: float, tokens: float, flops_per_token: float) -> list[Suggestion]:
    """What two laws say for a model of so many `parameters` that is trained on so many `tokens`.

    Of a MoE take the parameters that are active; both laws were fitted to dense models first.
    """
    compute = flops_per_token * tokens
    return [
        # Bi et al. 2024 (arXiv 2401.02954), equation 1: of the compute of the layers and attention.
        Suggestion("DeepSeek LLM, arXiv 2401.02954", 0.3118 * compute**-0.1250, 0.2920 * compute**0.3271),
        # Li et al. 2025 (arXiv 2503.04715), equation 1.
        Suggestion("Step Law, arXiv 2503.04715", 1.79 * parameters**-0.713 * tokens**0.307, 0.58 * tokens**0.571),
    ]


@dataclass(frozen=True)
class Upcycling:
    """Tokens of a MoE at which upcycling and other ways to spend the same compute meet."""

    better_than_dense: float
    """From here on the upcycled model was better than the dense one that went on."""
    scratch_catches_up: float
    """Up to here at least it was better than the same MoE from scratch."""


def upcycling(dense_tokens: float, dense_flops: float, moe_flops: float) -> Upcycling:
    """The rule of sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055) in tokens of the MoE.

    In units of the compute that the dense model has cost: with half of it the upcycled model was clearly better than
    the dense one; with as much as all of it the same MoE from scratch had not caught up. What was saved is thus worth
    up to the dense model's own cost and no more: who has several times that to spend begins from scratch.

    Args:
        dense_tokens: that the dense model was trained on.
        dense_flops: a token, as moe_flops.
    """
    sunk = dense_tokens * dense_flops / moe_flops
    return Upcycling(sunk / 2, sunk)


# Liew, Kato and Takase 2025 (arXiv 2502.03009), equation 12 and table 2, of which two copies have these coefficients:
# nats a token on SlimPajama, of 8 experts with two active. Logarithms are natural: of any other base the law would
# never let the model from scratch catch up, and with them it does where the authors stopped.
_IRREDUCIBLE = 0.165


def upcycled_loss(parameters: float, dense_tokens: float, tokens: float) -> float:
    """Loss of a MoE that was upcycled from a dense model of so many `parameters`.

    What the dense model has read makes the loss lower and its fall with more tokens slower: the interaction of both.

    Args:
        parameters: of the dense model.
        dense_tokens: that it was trained on.
        tokens: that the MoE was trained on since.
    """
    slope = -0.085 + 7.98e-4 * math.log(dense_tokens)
    return float(16.3 * dense_tokens**-0.043 * tokens**slope + 8.53 * parameters**-0.112 + _IRREDUCIBLE)


def scratch_moe_loss(parameters: float, tokens: float) -> float:
    """Loss of the same MoE from random weights; `parameters` are those of its dense counterpart."""
    return float(32.0 * tokens**-0.161 + 7.05 * parameters**-0.080 + _IRREDUCIBLE)


_FEWEST_TOKENS, _MOST_TOKENS, _STEP = 1e8, 1e14, 1.01


def scratch_catches_up(parameters: float, dense_tokens: float) -> float:
    """Tokens of the MoE at which the one from scratch first has the loss of the upcycled one, by the joint law.

    For fewer than that upcycling is the better use of a dense model that is there. To within a hundredth; infinite
    where the law has no such point up to 1e14 tokens.
    """
    tokens = _FEWEST_TOKENS
    while tokens < _MOST_TOKENS:
        if scratch_moe_loss(parameters, tokens) <= upcycled_loss(parameters, dense_tokens, tokens):
            return tokens
        tokens *= _STEP
    return math.inf
