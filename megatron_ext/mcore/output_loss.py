"""The output z-loss (PaLM, arXiv 2204.02311, section 5), without another pass over the vocabulary."""

#   B micro-batch, S sequence of this rank, V vocabulary, TP tensor-parallel ranks

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.mcore.group_sums import sum_over_group


def logits_of_labels(labels_BS: Tensor, logits_SBV: Tensor, first: int, tp_group: dist.ProcessGroup) -> Tensor:
    """The logit of each token's label, [B, S] in fp32.

    Args:
        logits_SBV: this TP rank's part of the logits, [S, B, V / TP].
        first: the first vocabulary entry of that part.
    """
    local_SB = labels_BS.t() - first
    here_SB = (local_SB >= 0) & (local_SB < logits_SBV.shape[-1])
    # Indexing, unlike gather, keeps no hold of the logits for its backward pass.
    sequence = torch.arange(logits_SBV.shape[0], device=logits_SBV.device).unsqueeze(1)
    batch = torch.arange(logits_SBV.shape[1], device=logits_SBV.device)
    of_labels_SB = logits_SBV[sequence, batch, local_SB.where(here_SB, 0)].float() * here_SB
    return sum_over_group(of_labels_SB, tp_group).t()


def z_loss(cross_entropy_BS: Tensor, of_labels_BS: Tensor) -> Tensor:
    """log(Z)^2 of each token, [B, S], where Z is the sum over the vocabulary of the exponentiated logits.

    The cross-entropy of a token is log(Z) minus the logit of its label, so their sum is log(Z).
    """
    return (cross_entropy_BS + of_labels_BS).square()
