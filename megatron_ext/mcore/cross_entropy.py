"""Cross-entropy over a vocabulary split over the TP group, without a second tensor of the size of the logits."""

#   T tokens, V vocabulary entries of this TP rank

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Logits that are worked on at a time in fp32: few beside all of them, many beside the cost of a call, and on CPU few
# enough for its caches.
BLOCK = {"cpu": 2**22, "cuda": 2**27}


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
        width = logits_TV.shape[1]
        entries = Entries.of(labels.reshape(-1), group.rank() * width, width, true_vocab_size)
        log_sum_T, of_label_T = entries.sums(logits_TV, triton)
        log_sum_T, of_label_T = over_all_ranks(log_sum_T, of_label_T, group)
        ctx.save_for_backward(logits, entries.local_T, entries.here_T, log_sum_T)
        ctx.real, ctx.triton = entries.real, triton
        return (log_sum_T - of_label_T).view(labels.shape), log_sum_T.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, local_T, here_T, log_sum_T = ctx.saved_tensors
        logits_TV = logits.view(-1, logits.shape[-1])
        entries = Entries(local_T, here_T, ctx.real)
        entries.write_gradient(logits_TV, log_sum_T, grads[0].reshape(-1), grads[1].reshape(-1), ctx.triton)
        return logits.detach(), None, None, None, None


@dataclass(frozen=True)
class Entries:
    """Consecutive entries of the vocabulary, all of a rank or a part of them, and the labels that are among them."""

    local_T: Tensor
    """The place of each token's label among them; 0 where it is none of them."""
    here_T: Tensor
    """Whether it is one of them."""
    real: int
    """Entries from here on are padding."""

    @classmethod
    def of(cls, labels_T: Tensor, first: int, width: int, true_vocab_size: int) -> "Entries":
        """The `width` entries from `first` on."""
        real = min(max(true_vocab_size - first, 0), width)
        local_T = labels_T - first
        here_T = (local_T >= 0) & (local_T < real)
        return cls(local_T.where(here_T, 0), here_T, real)

    def sums(self, logits_TV: Tensor, triton: bool) -> tuple[Tensor, Tensor]:
        """Of these entries' logits log sum exp, and the label's logit where it is here, otherwise 0: [T] in fp32."""
        of_label_T = logits_TV.gather(1, self.local_T.unsqueeze(1)).squeeze(1).float() * self.here_T
        return _log_sum_exp(logits_TV, self.real, triton), of_label_T

    def write_gradient(
        self, logits_TV: Tensor, log_sum_T: Tensor, grad_loss_T: Tensor, grad_log_sum_T: Tensor, triton: bool
    ) -> None:
        """Write the gradient into the logits' memory.

        Args:
            log_sum_T: over the whole vocabulary.
            grad_loss_T: gradient of the cross-entropy.
            grad_log_sum_T: and that of log(Z) itself.
        """
        grad_sum_T, grad_label_T = grad_loss_T + grad_log_sum_T, grad_loss_T * self.here_T
        _write_gradient(logits_TV, log_sum_T, self.local_T, grad_sum_T, grad_label_T, self.real, triton)


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


def over_all_ranks(log_sum_T: Tensor, of_label_T: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Bring together the log sums exp of all ranks of `group`, and the logits of the labels, each of which one has."""
    if group.size() == 1:
        return log_sum_T, of_label_T
    largest_T = log_sum_T.clone()
    dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack([(log_sum_T - largest_T).exp(), of_label_T])
    dist.all_reduce(sums, group=group)
    return sums[0].log() + largest_T, sums[1]


def _blocks(logits_TV: Tensor) -> Iterator[slice]:
    step = max(BLOCK[logits_TV.device.type] // logits_TV.shape[1], 1)
    return (slice(start, start + step) for start in range(0, logits_TV.shape[0], step))
