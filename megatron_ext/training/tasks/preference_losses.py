"""The losses of preference optimisation, as pure functions of the log-probabilities of both answers.

Tensors may have any shape and dtype; the last dimension is the answer, chosen and rejected. Formulas are those of the
papers that config/task.py names, checked against TRL's.
"""

#   P pairs; sums_P2 of an answer's log-probabilities over its tokens, tokens_P2 how many these are

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.config import PreferenceTask


@dataclass(frozen=True)
class PairLosses:
    """What is reported of each pair; `loss` is minimised."""

    loss: Tensor
    nll: Tensor
    """Mean cross-entropy of the tokens of the chosen answer."""
    rewards: Tensor
    """[..., 2]: beta times what the answer has gained over the reference; of losses without one, times what it has."""


def pair_losses(task: PreferenceTask, sums_P2: Tensor, tokens_P2: Tensor, reference_P2: Tensor | None) -> PairLosses:
    """The loss of each pair.

    Args:
        reference_P2: the sums of the reference; None for losses without one.
    """
    gained = sums_P2 if reference_P2 is None else sums_P2 - reference_P2
    compared = gained / tokens_P2 if task.by_means else gained
    difference = compared[..., 0] - compared[..., 1]
    nll = -sums_P2[..., 0] / tokens_P2[..., 0]
    if task.loss == "orpo":
        loss = nll + task.beta * _odds_ratio_loss(compared)
    else:
        loss = _of_difference(task, difference) + (task.nll * nll if task.nll else 0.0)
    return PairLosses(loss, nll, task.beta * compared)


def _of_difference(task: PreferenceTask, difference: Tensor) -> Tensor:
    """The losses that see only how much more the chosen answer has gained than the rejected one."""
    scaled = task.beta * difference
    if task.loss == "hinge":
        return (1 - scaled).relu()
    if task.loss == "ipo":
        return (difference - 1 / (2 * task.beta)).square()
    if task.loss == "simpo":
        return -F.logsigmoid(scaled - (task.gamma or 0.0))
    share = task.label_smoothing
    right, wrong = -F.logsigmoid(scaled), -F.logsigmoid(-scaled)
    if task.loss == "robust":
        return ((1 - share) * right - share * wrong) / (1 - 2 * share)
    return (1 - share) * right + share * wrong if share else right


def _odds_ratio_loss(means: Tensor) -> Tensor:
    """ORPO's loss of the odds of both answers, eq. 7 there, of their mean log-probabilities."""
    # An answer that is certain has a mean of 0 in fp32, and no odds: the least that is not certain stands for it.
    means = means.clamp(max=-torch.finfo(means.dtype).tiny)
    log_odds = means - torch.log(-torch.expm1(means))
    return -F.logsigmoid(log_odds[..., 0] - log_odds[..., 1])
