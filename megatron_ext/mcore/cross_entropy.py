"""Cross-entropy over a vocabulary split over the TP group, without a second tensor of the size of the logits."""

#   T tokens, V vocabulary entries of this TP rank

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Elements of one block of rows that is worked on in fp32: small beside the logits, large beside the cost of a call, and
# on CPU small enough for its caches.
_BLOCK = {"cpu": 2**22, "cuda": 2**27}


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, true_vocab_size: int, group: Any, *, triton: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each token and its log(Z) = log sum exp(logits), in fp32, shaped as `labels`.

    The backward pass writes the gradient into the memory of `logits`, whose values are lost: a language model's logits
    are its largest tensor, and nothing else needs them. Autograd refuses to use them again afterwards.

    Args:
        logits: [..., V], the entries from `rank * V` on; contiguous.
        labels: vocabulary entries of all ranks, shaped as `logits` without the last dimension.
        true_vocab_size: entries from here on are padding, and have probability zero.
        group: the TP group.
        triton: by our own kernels (mcore/kernels/cross_entropy.py), one pass each way.
    """
    losses, log_sums = _CrossEntropy.apply(logits, labels, true_vocab_size, group, triton)
    return losses, log_sums


class _CrossEntropy(torch.autograd.Function):
    """loss = log(Z) - logits[label]; the gradient of log(Z) is softmax(logits), that of the loss has -onehot(label)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, true_vocab_size: int, group: Any, triton: bool
    ) -> tuple[Tensor, Tensor]:
        logits_TV = logits.view(-1, logits.shape[-1])
        first = group.rank() * logits_TV.shape[1]
        real = min(max(true_vocab_size - first, 0), logits_TV.shape[1])
        local_T = labels.reshape(-1) - first
        here_T = (local_T >= 0) & (local_T < real)
        local_T = local_T.where(here_T, 0)
        of_label_T = logits_TV.gather(1, local_T.unsqueeze(1)).squeeze(1).float() * here_T
        log_sum_T = _log_sum_exp(logits_TV, real, triton)
        if group.size() > 1:
            log_sum_T = _over_all_ranks(log_sum_T, of_label_T, group)
        ctx.save_for_backward(logits, local_T, here_T, log_sum_T)
        ctx.real, ctx.triton = real, triton
        return (log_sum_T - of_label_T).view(labels.shape), log_sum_T.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, local_T, here_T, log_sum_T = ctx.saved_tensors
        logits_TV = logits.view(-1, logits.shape[-1])
        grad_label_T, grad_sum_T = grads[0].reshape(-1), (grads[0] + grads[1]).reshape(-1)
        _write_gradient(logits_TV, log_sum_T, local_T, grad_sum_T, grad_label_T * here_T, ctx.real, ctx.triton)
        return logits.detach(), None, None, None, None


def _log_sum_exp(logits_TV: Tensor, real: int, triton: bool) -> Tensor:
    """Log sum exp of the first `real` entries of each row, [T] in fp32."""
    if triton:
        from megatron_ext.mcore.kernels.cross_entropy import log_sum_exp

        return log_sum_exp(logits_TV, real)
    log_sum_T = torch.empty(len(logits_TV), dtype=torch.float32, device=logits_TV.device)
    for rows in _blocks(logits_TV):
        torch.logsumexp(logits_TV[rows, :real].float(), dim=1, out=log_sum_T[rows])
    return log_sum_T


def _write_gradient(
    logits_TV: Tensor,
    log_sum_T: Tensor,
    local_T: Tensor,
    grad_sum_T: Tensor,
    grad_label_T: Tensor,
    real: int,
    triton: bool,
) -> None:
    """Write `softmax * grad_sum`, less `grad_label` at the label, into the logits; 0 into the padding."""
    if triton:
        from megatron_ext.mcore.kernels.cross_entropy import write_gradient

        write_gradient(logits_TV, log_sum_T, local_T, grad_sum_T, grad_label_T, real)
        return
    for rows in _blocks(logits_TV):
        block, grad = logits_TV[rows], grad_sum_T[rows].unsqueeze(1)
        softmax = block[:, :real].float()  # a copy, or for fp32 logits their own memory
        softmax.sub_(log_sum_T[rows].unsqueeze(1)).exp_().mul_(grad)
        if real:  # not a rank that has padding alone
            softmax.scatter_add_(1, local_T[rows].unsqueeze(1), -grad_label_T[rows].unsqueeze(1))
        block[:, :real] = softmax
        block[:, real:] = 0


def _over_all_ranks(log_sum_T: Tensor, of_label_T: Tensor, group: Any) -> Tensor:
    """Add up the ranks' sums of exponentials; and, in place, the logits of the labels, each of which one rank has."""
    largest_T = log_sum_T.clone()
    dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack([(log_sum_T - largest_T).exp(), of_label_T])
    dist.all_reduce(sums, group=group)
    of_label_T.copy_(sums[1])
    return sums[0].log() + largest_T


def _blocks(logits_TV: Tensor) -> Iterator[slice]:
    step = max(_BLOCK[logits_TV.device.type] // logits_TV.shape[1], 1)
    return (slice(start, start + step) for start in range(0, logits_TV.shape[0], step))
