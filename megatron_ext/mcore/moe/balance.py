"""What keeps experts balanced: losses on the router, coefficients that adapt, and the bias that needs no loss."""

#   S sequence, B micro-batch, T = S x B tokens of this rank, E experts

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.config import AdaptiveAuxLoss


def switch_loss(counts: Tensor, mean_probability: Tensor) -> Tensor:
    """The balance loss `E * sum_i f_i P_i` (Switch Transformer, arXiv 2101.03961, eq. 4), averaged over leading dims.

    Args:
        counts: [..., E] assignments to each expert; f_i is their share. Carries no gradient.
        mean_probability: [..., E] mean probability P_i of each expert, or one rank's part of the mean: parts add up to
            the loss.

    Returns:
        A scalar; 1 when tokens are spread evenly.
    """
    share = counts / counts.sum(dim=-1, keepdim=True)
    return counts.shape[-1] * (share * mean_probability).sum(dim=-1).mean()


def micro_batch_loss(
    counts_E: Tensor, probabilities_TE: Tensor, splits: int, group: dist.ProcessGroup | None
) -> Tensor:
    """This rank's part of `aux_loss`: shares and probabilities over all tokens of the micro-batch.

    Args:
        splits: ranks that have different tokens of the same micro-batch.
        group: those ranks.
    """
    return switch_loss(summed(counts_E, group), probabilities_TE.sum(dim=0) / (probabilities_TE.shape[0] * splits))


def sequence_loss(
    chosen_TE: Tensor, probabilities_TE: Tensor, batch: int, splits: int, group: dist.ProcessGroup | None
) -> Tensor:
    """This rank's part of `seq_aux_loss` (DeepSeek-V3, arXiv 2412.19437, eqs. 17-20): the mean over sequences."""
    counts_BE = summed(chosen_TE.unflatten(0, (-1, batch)).sum(dim=0), group)
    probabilities_SBE = probabilities_TE.unflatten(0, (-1, batch))
    return switch_loss(counts_BE, probabilities_SBE.sum(dim=0) / (probabilities_SBE.shape[0] * splits))


def z_loss(logits_TE: Tensor, splits: int) -> Tensor:
    """This rank's part of the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5): the mean square of log sum exp."""
    return logits_TE.logsumexp(dim=-1).square().sum() / (logits_TE.shape[0] * splits)


def summed(counts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`counts` in fp32, summed over `group` if there is one."""
    total = counts.float()
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


def adapted_coefficient(
    coefficient: Tensor, counts_E: Tensor, dropped: Tensor, adaptive: AdaptiveAuxLoss, capacity_factor: float | None
) -> Tensor:
    """The balance-loss coefficient after a step (Skywork-MoE, arXiv 2406.06563, section 4.2, eqs. 7-9).

    Args:
        counts_E: assignments of the step's whole batch, dropped ones included.
        dropped: how many of them were dropped; without a capacity, what the proxy capacity would drop is taken.
    """
    if capacity_factor is None:
        capacity = adaptive.proxy_capacity_factor * counts_E.mean()
        dropped = (counts_E - capacity).clamp(min=0).sum()
    target = (adaptive.xi * dropped / counts_E.sum()).clamp(max=adaptive.alpha_max)
    return adaptive.beta * coefficient + (1 - adaptive.beta) * target


def moved_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """The expert bias after a step (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): up where load is below the mean."""
    return bias_E + rate * torch.sign(counts_E.mean() - counts_E)
