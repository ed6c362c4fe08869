"""One optimizer step, and one validation, over the micro-batches of a global batch."""

#   M micro-batches of this rank, D data-parallel ranks, C context-parallel ranks,
#   N tokens of the global batch whose label counts

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ext.data.batches import MicroBatch
from megatron_ext.errors import TrainingError
from megatron_ext.mcore.optimizer import clip_and_step, gradient_norm
from megatron_ext.mcore.step_state import StepParticipant
from megatron_ext.runtime.process_groups import Groups

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """What a step reports."""

    loss: Tensor
    """Cross-entropy a token, over the whole global batch; on every rank."""
    tokens: Tensor
    """Tokens whose label counted."""
    output_z_loss: Tensor
    """Weighted output z-loss a token, which `loss` leaves out; 0 without one."""
    grad_norm: float
    """Global norm of the gradient before clipping."""
    asking_to_stop: int
    """How many ranks ask to stop after this step; the same on every rank."""


def train_step(
    wrapped: Sequence[Any],
    optimizer: ChainedOptimizer,
    batch: Sequence[MicroBatch],
    groups: Groups,
    *,
    participants: Sequence[StepParticipant],
    max_norm: float,
    asks_to_stop: Callable[[], bool] = lambda: False,
) -> StepResult:
    """Forward, backward and update over this rank's micro-batches of one global batch.

    Args:
        participants: what moves with the steps beside weights and optimizer.
        asks_to_stop: asked late in the step; the answers of all ranks travel with the loss.

    Raises:
        TrainingError: the gradient is not finite; on every rank, with weights and optimizer as they were before.
    """
    for chunk in wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    for participant in participants:
        participant.begin()
    (loss, z_loss, stops), tokens = _run(wrapped, batch, groups, forward_only=False, asks_to_stop=asks_to_stop)
    norm = gradient_norm(optimizer)
    # Here, where the device has just been waited for, and before it is given more to do.
    asking_to_stop = int(stops)
    if not math.isfinite(norm):
        for participant in participants:
            participant.discard()
        if not float(tokens):
            raise TrainingError(
                "no label of the global batch counts, so there is no loss: every token is masked (with "
                "data.eod_mask_loss, the batch holds nothing but ends of documents); pass over it with train.skip_steps"
            )
        raise TrainingError(
            f"the loss is {float(loss):g} and the gradient norm {norm:g}; the weights were not updated. Start again to "
            "go on from the newest checkpoint, past this step (train.skip_steps) or with a lower optimizer.lr"
        )
    clip_and_step(optimizer, norm, max_norm)
    # After the update, so that a refused step moves neither biases nor coefficients nor scales.
    for participant in participants:
        participant.commit(groups.stage)
    return StepResult(loss, tokens, z_loss, norm, asking_to_stop)


@torch.no_grad()
def validation_loss(wrapped: Sequence[Any], batches: Iterator[Sequence[MicroBatch]], groups: Groups) -> Tensor:
    """Cross-entropy a token over all `batches`, on every rank."""
    for chunk in wrapped:
        chunk.eval()
    total = tokens = torch.zeros(())
    for batch in batches:
        (loss, _, _), counted = _run(wrapped, batch, groups, forward_only=True)
        total, tokens = total.to(loss) + loss * counted, tokens.to(loss) + counted
    if not float(tokens):
        log.warning("no label of the validation samples counts: there is no validation loss")
    return total / tokens


def _run(
    wrapped: Sequence[Any],
    batch: Sequence[MicroBatch],
    groups: Groups,
    *,
    forward_only: bool,
    asks_to_stop: Callable[[], bool] = lambda: False,
) -> tuple[Tensor, Tensor]:
    """Run the pipeline schedule; return the mean cross-entropy and output z-loss a token with the stops, [3], and N."""
    rows, length = batch[0].tokens.shape
    batch = [micro.context_share(groups.cp.rank(), groups.cp.size()) for micro in batch]
    tokens = torch.stack([micro.loss_mask.sum() for micro in batch]).sum()
    dist.all_reduce(tokens, group=groups.dp_cp)
    # The schedule multiplies each rank's loss by C / M (in every version, for a loss function that returns a pair) and
    # gradients are averaged over D * C, so that this weight leaves sum / N: the mean over all tokens of the global
    # batch in every layout. Balance losses, which the schedule scales by C / M too, are left divided by M * D alone:
    # the mean over micro-batches, as on one process. (megatron-core's own per-token mode divides them by N too, and
    # its correction is wrong under TP and CP in 0.16.)
    weight = len(batch) * groups.dp.size() / tokens
    iterators = [iter(batch) for _ in wrapped]
    sums = get_forward_backward_func()(
        forward_step_func=partial(_forward, weight),
        data_iterator=iterators if len(wrapped) > 1 else iterators[0],
        model=list(wrapped) if len(wrapped) > 1 else wrapped[0],
        num_microbatches=len(batch),
        # Of the whole sequence: the schedule itself takes a context-parallel rank's share.
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    # Every TP rank of the last stage has the same sums; one of them contributes, and everyone learns the result. Each
    # context-parallel rank contributes the sum over its own tokens.
    contributes = groups.is_last_stage and groups.tp.rank() == 0
    totals = torch.stack(sums).sum(dim=0) if contributes else torch.zeros(2, device=tokens.device)
    totals = F.pad(totals, (0, 1), value=float(asks_to_stop()))
    dist.all_reduce(totals, group=groups.world)
    return torch.cat([totals[:2] / tokens.clamp(min=1), totals[2:]]), tokens


def _forward(weight: Tensor, batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
    micro = next(batches)
    output = model(
        micro.tokens, micro.position_ids, micro.document_lengths, labels=micro.labels, sample_seeds_B=micro.seeds
    )

    def loss(losses: Tensor) -> tuple[Tensor, Tensor]:
        # [B, S], or with an output z-loss [2, B, S]
        totals = (losses.float() * micro.loss_mask).sum(dim=(-2, -1)).view(-1)
        return totals.sum() * weight, F.pad(totals.detach(), (0, 2 - len(totals)))

    return output, loss
