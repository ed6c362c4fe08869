"""One optimizer step, and one validation, over the micro-batches of a global batch."""

#   M micro-batches of this rank, D data-parallel ranks, C context-parallel ranks,
#   N units of the global batch that count: in pretraining, tokens

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.data.stream.batches import MicroBatch
from megatron_ext.mcore.build import Trainable
from megatron_ext.mcore.optimizer import clip_and_step, gradient_norm
from megatron_ext.mcore.schedules import run_schedule
from megatron_ext.runtime.process_groups import Groups
from megatron_ext.training.tasks.base import TrainTask
from megatron_ext.training.verdict import Judge, Take, Verdict, take_finite

log = logging.getLogger(__name__)


def never() -> bool:
    """Nobody asks to stop."""
    return False


@dataclass(frozen=True)
class StepResult:
    """What a step reports, the same on every rank."""

    losses: Mapping[str, Tensor]
    """Each sum of the task over the whole global batch, divided by the units that count."""
    grad_norm: float
    """Global norm of the gradient before clipping."""
    verdict: Verdict
    """Whether the weights were updated."""
    asking_to_stop: int
    """How many ranks ask to stop after this step."""

    @property
    def loss(self) -> Tensor:
        """The loss by which the run is judged: the first of the task's sums."""
        return next(iter(self.losses.values()))


def train_step(
    trainable: Trainable,
    task: TrainTask,
    batch: Sequence[MicroBatch],
    groups: Groups,
    *,
    max_norm: float,
    judge: Judge = take_finite,
    asks_to_stop: Callable[[], bool] = never,
) -> StepResult:
    """Forward, backward and, if `judge` takes it, update over this rank's micro-batches of one global batch.

    Args:
        max_norm: the gradient is scaled down to this norm; 0 leaves it.
        asks_to_stop: asked late in the step; the answers of all ranks travel with the loss.

    Raises:
        TrainingError: `judge` says that the run cannot go on; on every rank, with weights and optimizer as before.
    """
    optimizer, participants = trainable.optimizer, trainable.participants
    for chunk in trainable.wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    for participant in participants:
        participant.begin()
    sums = _run(trainable.wrapped, task, batch, groups, forward_only=False, asks_to_stop=asks_to_stop)
    norm = gradient_norm(optimizer)
    # Here, where the device has just been waited for, and before it is given more to do.
    asking_to_stop = int(sums.stops)
    taken = False
    try:
        verdict = judge(sums.losses, norm, sums.units)
        taken = isinstance(verdict, Take)
    finally:
        if not taken:
            for participant in participants:
                participant.discard()
    if taken:
        clip_and_step(optimizer, norm, max_norm)
        # After the update, so that a refused step moves neither biases nor coefficients nor scales.
        for participant in participants:
            participant.commit(groups.stage)
    return StepResult(sums.losses, norm, verdict, asking_to_stop)


@torch.no_grad()
def validation_loss(
    trainable: Trainable, task: TrainTask, batches: Iterable[Sequence[MicroBatch]], groups: Groups
) -> Tensor:
    """The task's loss over all `batches`, on every rank."""
    for chunk in trainable.wrapped:
        chunk.eval()
    total = units = torch.zeros(())
    for batch in batches:
        sums = _run(trainable.wrapped, task, batch, groups, forward_only=True)
        loss = sums.losses[task.sums[0]]
        total, units = total.to(loss) + loss * sums.units, units.to(loss) + sums.units
    if not float(units):
        log.warning("no label of the validation samples counts: there is no validation loss")
    return total / units


@dataclass(frozen=True)
class _Sums:
    """What all ranks know of a global batch."""

    losses: dict[str, Tensor]
    """The task's sums, each divided by `units`."""
    units: Tensor
    """N."""
    stops: Tensor
    """Ranks that ask to stop."""


def _run(
    wrapped: Sequence[Any],
    task: TrainTask,
    batch: Sequence[MicroBatch],
    groups: Groups,
    *,
    forward_only: bool,
    asks_to_stop: Callable[[], bool] = never,
) -> _Sums:
    """Run the pipeline schedule over a global batch."""
    rows, length = batch[0].tokens.shape
    batch = [micro.context_share(groups.cp.rank(), groups.cp.size()) for micro in batch]
    units = task.units(batch)
    dist.all_reduce(units, group=groups.dp_cp)
    # The schedule multiplies each rank's loss by C / M (in every version, for a loss function that returns a pair) and
    # gradients are averaged over D * C, so that this weight leaves sum / N: the mean over all units of the global
    # batch in every layout. Balance losses, which the schedule scales by C / M too, are left divided by M * D alone:
    # the mean over micro-batches, as on one process. (megatron-core's own per-token mode divides them by N too, and
    # its correction is wrong under TP and CP in 0.16.)
    weight = len(batch) * groups.dp.size() / units
    forward = partial(_forward, task, weight)
    sums = run_schedule(wrapped, forward, batch, rows=rows, length=length, forward_only=forward_only)
    # Every TP rank of the last stage has the same sums; one of them contributes, and everyone learns the result. Each
    # context-parallel rank contributes the sum over its own tokens.
    contributes = groups.is_last_stage and groups.tp.rank() == 0
    if contributes:
        # A column more, since torch adds up one alone in another order: a sum does not depend on how many there are.
        totals = F.pad(torch.stack(sums), (0, 1)).sum(dim=0)
    else:
        totals = torch.zeros(len(task.sums) + 1, device=units.device)
    totals[-1] += float(asks_to_stop())
    dist.all_reduce(totals, group=groups.world)
    means = totals[:-1] / units.clamp(min=1)
    return _Sums(dict(zip(task.sums, means, strict=True)), units, totals[-1])


def _forward(task: TrainTask, weight: Tensor, batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
    micro = next(batches)
    output = task.forward(model, micro)

    def loss(output: Tensor) -> tuple[Tensor, Tensor]:
        sums = task.loss(output, micro)
        none = torch.zeros((), device=weight.device)
        minimised = sum((total for total in sums.values() if total.requires_grad), start=none)
        return minimised * weight, torch.stack([sums.get(name, none).detach() for name in task.sums])

    return output, loss
