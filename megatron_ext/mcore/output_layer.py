"""The output layer together with its loss, a part of the vocabulary at a time: all logits are never in memory."""

#   S sequence, B micro-batch, H hidden; T tokens of a TP group; V vocabulary entries of this TP rank, C of one part

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.mcore.cross_entropy import BLOCK, Entries, over_all_ranks
from megatron_ext.mcore.linear import ColumnParallelLinear, gradient_sum
from megatron_ext.mcore.products import add_product, product, write_product
from megatron_ext.mcore.sequence_parts import gather, reduce_scatter

_MULTIPLE = 128
"""Entries of a part, so that the products have whole tiles."""


class LossByParts(ColumnParallelLinear):
    """An output layer that, given labels, returns losses and keeps no logits for the backward pass."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        labels: Tensor | None = None,
        true_vocab_size: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Without labels see ColumnParallelLinear.

        Args:
            input_: hidden states [S, B, H]; under sequence parallelism this rank's part of them.
            weight: [V, H], where the embedding is tied.
            labels: [S, B], all of the TP group.
            true_vocab_size: entries from here on are padding, and have probability zero.

        Returns:
            With labels the cross-entropy and log(Z) of each token, [S, B] in fp32.
        """
        if labels is None:
            logits, bias = super().forward(input_, weight, runtime_gather_output)
            return logits, bias
        table: Tensor = self.weight if weight is None else weight  # type: ignore[assignment]
        losses, log_sums = _OutputLoss.apply(
            input_,
            table,
            gradient_sum(self.config, table),
            labels,
            true_vocab_size,
            self.tp_group,
            self.sequence_parallel,
            self.config.triton_kernels,
        )
        return losses, log_sums


class _OutputLoss(torch.autograd.Function):
    """x = h W^T, log(Z) = log sum exp x, loss = log(Z) - x[label], over parts of W's rows.

    The backward pass computes a part's logits again and writes dx = softmax(x) (g + z) - onehot(label) g in their
    place, for the gradients g of the loss and z of log(Z); then dW = dx^T h is that part of the whole, one product over
    all tokens and rounded once, or added to its fp32 sum as it is; and dx W is added to dh in fp32. That is a fourth
    product beside the three.

    Liger (arXiv 2410.10989, section 3.2) and Cut Cross-Entropy (arXiv 2411.09009) save the same memory. Liger's parts
    are tokens, and it computes gradients in the forward pass: three products, but a second weight gradient waits for
    the backward pass in memory, and one number must weigh all losses. Here each token's loss has a gradient of its own,
    as weighted labels and sums of log-probabilities need, and log(Z) another.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight_VH: Tensor,
        sum_VH: Tensor | None,
        labels: Tensor,
        true_vocab_size: int,
        group: Any,
        gathers: bool,
        triton: bool,
    ) -> tuple[Tensor, Tensor]:
        whole = gather(hidden, group)[0] if gathers else hidden
        hidden_TH = whole.reshape(-1, whole.shape[-1])
        ctx.true_vocab_size, ctx.group, ctx.gathers, ctx.triton = true_vocab_size, group, gathers, triton
        ctx.sum = sum_VH
        log_sum_T = torch.full((len(hidden_TH),), -torch.inf, dtype=torch.float32, device=hidden.device)
        of_label_T = torch.zeros_like(log_sum_T)
        for part, entries in _parts(ctx, labels, weight_VH):
            log_sum, of_label = entries.sums(product(hidden_TH, weight_VH[part].t()), triton)
            torch.logaddexp(log_sum_T, log_sum, out=log_sum_T)
            of_label_T += of_label
        log_sum_T, of_label_T = over_all_ranks(log_sum_T, of_label_T, group)
        ctx.save_for_backward(hidden, weight_VH, labels, log_sum_T)
        return (log_sum_T - of_label_T).view(labels.shape), log_sum_T.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight_VH, labels, log_sum_T = ctx.saved_tensors
        grad_loss_T, grad_log_sum_T = (grad.reshape(-1) for grad in grads)
        whole = gather(hidden, ctx.group)[0] if ctx.gathers else hidden
        hidden_TH = whole.reshape(-1, whole.shape[-1])
        grad_TH = torch.zeros_like(hidden_TH, dtype=torch.float32)
        hands_on = ctx.needs_input_grad[1] and ctx.sum is None
        grad_weight_VH = torch.empty_like(weight_VH) if hands_on else None
        for part, entries in _parts(ctx, labels, weight_VH):
            logits_TC = product(hidden_TH, weight_VH[part].t())
            entries.write_gradient(logits_TC, log_sum_T, grad_loss_T, grad_log_sum_T, ctx.triton)
            add_product(grad_TH, logits_TC, weight_VH[part])
            if grad_weight_VH is not None:
                write_product(grad_weight_VH[part], logits_TC.t(), hidden_TH)
            elif ctx.needs_input_grad[1]:
                add_product(ctx.sum[part], logits_TC.t(), hidden_TH)
        grad_hidden = grad_TH.to(hidden.dtype).view_as(whole)
        if ctx.gathers:
            grad_hidden, reducing = reduce_scatter(grad_hidden, ctx.group)
            reducing.wait()
        elif ctx.group.size() > 1:
            dist.all_reduce(grad_hidden, group=ctx.group)
        return grad_hidden, grad_weight_VH, None, None, None, None, None, None


def _parts(ctx: Any, labels: Tensor, weight_VH: Tensor) -> Iterator[tuple[slice, Entries]]:
    """Parts of this rank's vocabulary, and the labels that are in each; as few as their logits allow, of one width."""
    labels_T, entries = labels.reshape(-1), len(weight_VH)
    number = -(-entries * len(labels_T) // BLOCK[labels.device.type])
    width = -(-entries // (number * _MULTIPLE)) * _MULTIPLE
    before = ctx.group.rank() * entries
    for start in range(0, entries, width):
        part = slice(start, min(start + width, entries))
        yield part, Entries.of(labels_T, before + start, part.stop - start, ctx.true_vocab_size)
