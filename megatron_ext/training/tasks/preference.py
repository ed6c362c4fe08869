"""Preference optimisation: how much more probable the chosen answer of a pair has become than the rejected one."""

#   B samples (packs), S sequence, P the most pairs of a sample of the micro-batch

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.config import PreferenceTask
from megatron_ext.data.stream.batches import MicroBatch
from megatron_ext.data.stream.pair_columns import PairColumns
from megatron_ext.mcore.adapters.plan import adapters_off
from megatron_ext.mcore.schedules import run_schedule
from megatron_ext.monitoring.sources import ACCURACY, MARGIN
from megatron_ext.training.tasks.preference_losses import pair_losses
from megatron_ext.training.tasks.pretrain import LOSS

_SUMS = (
    LOSS,
    "rewards/chosen",
    "rewards/rejected",
    ACCURACY,
    MARGIN,
    "logps/chosen",
    "logps/rejected",
    "nll",
)
"""As TRL and others call them; `nll` is the mean cross-entropy of the chosen answer's tokens, before its weight."""


@dataclass(frozen=True)
class Preference:
    """DPO and its kin; units are pairs.

    An answer's log-probability is a sum over tokens that context parallelism has spread over ranks. The whole sums are
    reduced without a gradient, and what is minimised is each rank's own part of them, times the gradient of the loss by
    the whole: exact for every loss of sums, and no collective has a backward pass.
    """

    settings: PreferenceTask
    reference: Literal["adapters_off", "file", "none"]
    context: dist.ProcessGroup
    """The ranks that have the other tokens of the same pairs."""
    table: Tensor | None = None
    """[pairs of the run, 2] fp32, what the reference says of every answer, with `file`."""
    has_perplexity = False

    @property
    def sums(self) -> tuple[str, ...]:
        """The loss, and what is plotted of preference optimisation under these names everywhere."""
        return _SUMS

    def prepare(
        self, wrapped: Sequence[Any], batch: Sequence[MicroBatch], *, rows: int, length: int
    ) -> list[MicroBatch]:
        """See `TrainTask.prepare`: what the reference says of the answers."""
        if self.reference == "none":
            return list(batch)
        if self.reference == "file":
            assert self.table is not None, "the table of the reference is read before the first step"
            return [_compared_with(micro, self.table[_pairs(micro).numbers]) for micro in batch]
        with adapters_off(wrapped):
            found = answer_log_probs(self, wrapped, batch, rows=rows, length=length)
        if not found:  # this is not the last stage
            return list(batch)
        return [_compared_with(micro, sums) for micro, sums in zip(batch, found, strict=True)]

    def forward(self, model: Any, micro: MicroBatch) -> Tensor:
        """The cross-entropy of each token [B, S]."""
        output: Tensor = model(
            micro.tokens, micro.position_ids, micro.document_lengths, labels=micro.labels, sample_seeds_B=micro.seeds
        )
        return output

    def loss(self, output: Tensor, micro: MicroBatch) -> Mapping[str, Tensor]:
        """Sums over the pairs of each sample. One of the context-parallel ranks reports them."""
        pairs = _pairs(micro)
        own_BP2 = pairs.sums(-output * micro.loss_mask)
        whole_BP2 = self._whole(own_BP2).requires_grad_(own_BP2.requires_grad)
        is_pair_BP = pairs.is_pair_BP
        with torch.enable_grad():
            # Where there is no pair, some numbers of which every loss is finite.
            sums_BP2 = torch.where(is_pair_BP[..., None], whole_BP2, -1.0)
            found = pair_losses(self.settings, sums_BP2, pairs.tokens_BP2.clamp(min=1.0), pairs.reference_BP2)
            loss_BP = torch.where(is_pair_BP, found.loss, 0.0)
        reports = self.context.rank() == 0

        def reported(values_BP: Tensor) -> Tensor:
            return torch.where(is_pair_BP & reports, values_BP.detach(), 0.0).sum(dim=-1)

        chosen_BP, rejected_BP = found.rewards.detach().unbind(dim=-1)
        values = (
            loss_BP,
            chosen_BP,
            rejected_BP,
            (chosen_BP > rejected_BP).float(),
            chosen_BP - rejected_BP,
            whole_BP2[..., 0],
            whole_BP2[..., 1],
            found.nll,
        )
        sums = dict(zip(_SUMS, map(reported, values), strict=True))
        if own_BP2.requires_grad:
            (slope_BP2,) = torch.autograd.grad(loss_BP.sum(), whole_BP2)
            own_B = (slope_BP2 * own_BP2).sum(dim=(1, 2))
            sums[LOSS] = sums[LOSS] + own_B - own_B.detach()
        return sums

    def units(self, micro: MicroBatch) -> Tensor:
        """Pairs of each sample; on one of the context-parallel ranks."""
        counted: Tensor = _pairs(micro).is_pair_BP & (self.context.rank() == 0)
        return counted.float().sum(dim=-1)

    def _whole(self, own_BP2: Tensor) -> Tensor:
        """The sums over the tokens of all context-parallel ranks, without a gradient."""
        whole_BP2 = own_BP2.detach().clone()
        if self.context.size() > 1:
            dist.all_reduce(whole_BP2, group=self.context)
        return whole_BP2


@torch.no_grad()
def answer_log_probs(
    task: Preference, wrapped: Sequence[Any], batch: Sequence[MicroBatch], *, rows: int, length: int
) -> list[Tensor]:
    """Log-probabilities of all answers by the weights as they are: [B, P, 2] of each micro-batch on the last stage.

    Nothing that training moves is touched: no random numbers, no counts of experts, no histories of fp8. Every rank
    must call this; other stages have nothing to return.

    Args:
        batch: this rank's share of the tokens.
    """
    were = [chunk.training for chunk in wrapped]
    for chunk in wrapped:
        chunk.eval()
    try:

        def forward(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
            micro = next(batches)

            def sums(output: Tensor) -> tuple[Tensor, Tensor]:
                own = _pairs(micro).sums(-output * micro.loss_mask)
                return own.sum(), task._whole(own)

            return task.forward(model, micro), sums

        return run_schedule(wrapped, forward, batch, rows=rows, length=length, forward_only=True)
    finally:
        for chunk, was in zip(wrapped, were, strict=True):
            chunk.train(was)


def _pairs(micro: MicroBatch) -> PairColumns:
    assert micro.pairs is not None, "pairs were read"
    return micro.pairs


def _compared_with(micro: MicroBatch, reference_BP2: Tensor) -> MicroBatch:
    return replace(micro, pairs=replace(_pairs(micro), reference_BP2=reference_BP2))
