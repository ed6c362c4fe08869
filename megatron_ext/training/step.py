"""One optimizer step, and one validation, over the micro-batches of a global batch."""

#   M micro-batches of this rank, D data-parallel ranks, C context-parallel ranks,
#   B samples of a micro-batch, N samples of this rank, K sums of the task, S sources of the data
#   units are what counts of the global batch: in pretraining, tokens

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.data.stream.batches import MicroBatch
from megatron_ext.mcore.build import Trainable
from megatron_ext.mcore.optimizer import clip_and_step, gradient_norm
from megatron_ext.mcore.schedules import run_schedule
from megatron_ext.runtime.process_groups import Groups
from megatron_ext.runtime.seeds import random_state, restore_random_state
from megatron_ext.training.guard.trace import find_first
from megatron_ext.training.tasks.base import TrainTask
from megatron_ext.training.verdict import Figures, FirstNonFinite, Judge, Take, Verdict, take_finite

log = logging.getLogger(__name__)


def unmarked(part: str) -> None:
    """Nobody wants to know what took how long."""


def never() -> bool:
    """Nobody asks to stop."""
    return False


@dataclass(frozen=True)
class SourceSums:
    """What became of the samples of each source; on the device, so that nobody waits for it before it is reported."""

    losses_S: Tensor
    """The loss by which the run is judged, summed over the units that count."""
    units_S: Tensor
    """Those units."""

    def __add__(self, other: "SourceSums") -> "SourceSums":
        return SourceSums(self.losses_S + other.losses_S, self.units_S + other.units_S)

    def read(self) -> list[tuple[float | None, float]]:
        """Of each source the mean loss and the number of units; None where no unit counted."""
        losses, units = torch.stack([self.losses_S, self.units_S]).tolist()
        return [(loss / count if count else None, count) for loss, count in zip(losses, units, strict=True)]


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
    sources: SourceSums
    """The same loss by source, over the whole global batch."""

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
    num_sources: int = 1,
    judge: Judge = take_finite,
    asks_to_stop: Callable[[], bool] = never,
    mark: Callable[[str], None] = unmarked,
) -> StepResult:
    """Forward, backward and, if `judge` takes it, update over this rank's micro-batches of one global batch.

    Args:
        num_sources: samples of sources from this number on are trained on, but reported of none.
        max_norm: the gradient is scaled down to this norm; 0 leaves it.
        asks_to_stop: asked late in the step; the answers of all ranks travel with the loss.
        mark: told of each part of the step when it is over.

    Raises:
        TrainingError: `judge` says that the run cannot go on; on every rank, with weights and optimizer as before.
    """
    device, participants = batch[0].tokens.device, trainable.participants
    before = random_state(device)
    _begin(trainable)
    run = partial(_run, trainable.wrapped, task, batch, groups, num_sources, forward_only=False)
    sums = run(asks_to_stop=asks_to_stop)
    mark("forward_backward")
    norm = gradient_norm(trainable.optimizer)
    # Here, where the device has just been waited for, and before it is given more to do.
    asking_to_stop = int(sums.stops)
    taken = False
    try:
        first_nonfinite = partial(_first_nonfinite, trainable, groups, run, before, device)
        verdict = judge(Figures(sums.losses, norm, sums.units, first_nonfinite))
        taken = isinstance(verdict, Take)
    finally:
        if not taken:
            for participant in participants:
                participant.discard()
            # What follows is as if the step had been passed over unseen.
            restore_random_state(before, device)
    if taken:
        clip_and_step(trainable.optimizer, norm, max_norm)
        # After the update, so that a refused step moves neither biases nor coefficients nor scales.
        for participant in participants:
            participant.commit(groups.stage)
    mark("optimizer")
    return StepResult(sums.losses, norm, verdict, asking_to_stop, sums.sources)


def _begin(trainable: Trainable) -> None:
    """Empty the gradients, and have what takes part in steps prepare for one."""
    for chunk in trainable.wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    trainable.optimizer.zero_grad()
    for participant in trainable.participants:
        participant.begin()


def _first_nonfinite(
    trainable: Trainable, groups: Groups, run: Callable[[], object], before: dict[str, Any], device: torch.device
) -> FirstNonFinite:
    """Where the step that `run` computes from the random state `before` meets a number that is not finite."""

    def compute_again() -> None:
        for participant in trainable.participants:
            participant.discard()
        _begin(trainable)
        restore_random_state(before, device)
        run()

    return find_first(trainable, groups, compute_again)


@torch.no_grad()
def validation_loss(
    trainable: Trainable,
    task: TrainTask,
    batches: Iterable[Sequence[MicroBatch]],
    groups: Groups,
    num_sources: int = 1,
) -> tuple[dict[str, Tensor], SourceSums | None]:
    """The task's sums over all `batches`, each by the units, and the loss by source; no sources without a batch."""
    for chunk in trainable.wrapped:
        chunk.eval()
    totals, units = dict.fromkeys(task.sums, torch.zeros(())), torch.zeros(())
    sources: SourceSums | None = None
    for batch in batches:
        sums = _run(trainable.wrapped, task, batch, groups, num_sources, forward_only=True)
        totals = {name: total.to(sums.units) + sums.losses[name] * sums.units for name, total in totals.items()}
        units = units.to(sums.units) + sums.units
        sources = sums.sources if sources is None else sources + sums.sources
    if not float(units):
        log.warning("no label of the validation samples counts: there is no validation loss")
    return {name: total / units for name, total in totals.items()}, sources


@dataclass(frozen=True)
class _Sums:
    """What all ranks know of a global batch."""

    losses: dict[str, Tensor]
    """The task's sums, each divided by `units`."""
    units: Tensor
    """All that count."""
    sources: SourceSums
    stops: Tensor
    """Ranks that ask to stop."""


def _run(
    wrapped: Sequence[Any],
    task: TrainTask,
    batch: Sequence[MicroBatch],
    groups: Groups,
    num_sources: int,
    *,
    forward_only: bool,
    asks_to_stop: Callable[[], bool] = never,
) -> _Sums:
    """Run the pipeline schedule over a global batch."""
    rows, length = batch[0].tokens.shape
    batch = [micro.context_share(groups.cp.rank(), groups.cp.size()) for micro in batch]
    units_N, sources_N = torch.cat([task.units(micro) for micro in batch]), torch.cat([m.sources for m in batch])
    counted = torch.cat([units_N.sum().view(1), _by_source(units_N, sources_N, num_sources)])
    dist.all_reduce(counted, group=groups.dp_cp)
    units = counted[0]
    batch = task.prepare(wrapped, batch, rows=rows, length=length)
    # The schedule multiplies each rank's loss by C / M (in every version, for a loss function that returns a pair) and
    # gradients are averaged over D * C, so that this weight leaves sum / units: the mean over all units of the global
    # batch in every layout. Balance losses, which the schedule scales by C / M too, are left divided by M * D alone:
    # the mean over micro-batches, as on one process. (megatron-core's own per-token mode divides them by units too, and
    # its correction is wrong under TP and CP in 0.16.)
    weight = len(batch) * groups.dp.size() / units
    forward = partial(_forward, task, weight, num_sources)
    sums = run_schedule(wrapped, forward, batch, rows=rows, length=length, forward_only=forward_only)
    # Every TP rank of the last stage has the same sums; one of them contributes, and everyone learns the result. Each
    # context-parallel rank contributes the sum over its own tokens.
    totals = torch.zeros(len(task.sums) + num_sources + 1, device=units.device)
    if groups.is_last_stage and groups.tp.rank() == 0:
        totals[:-1] = torch.stack(sums).sum(dim=0)
    totals[-1] = float(asks_to_stop())
    dist.all_reduce(totals, group=groups.world)
    losses, by_source, stops = totals.split([len(task.sums), num_sources, 1])
    means = dict(zip(task.sums, losses / torch.where(units > 0, units, 1.0), strict=True))
    return _Sums(means, units, SourceSums(by_source, counted[1:]), stops)


def _forward(
    task: TrainTask, weight: Tensor, num_sources: int, batches: Iterator[MicroBatch], model: Any
) -> tuple[Tensor, Any]:
    micro = next(batches)
    output = task.forward(model, micro)

    def loss(output: Tensor) -> tuple[Tensor, Tensor]:
        sums = task.loss(output, micro)
        none_B = torch.zeros(len(micro.tokens), device=weight.device)
        minimised = sum((rows_B.sum() for rows_B in sums.values() if rows_B.requires_grad), start=none_B.sum())
        rows_KB = torch.stack([sums.get(name, none_B).detach() for name in task.sums])
        return minimised * weight, torch.cat([rows_KB.sum(dim=1), _by_source(rows_KB[0], micro.sources, num_sources)])

    return output, loss


def _by_source(values_N: Tensor, sources_N: Tensor, num_sources: int) -> Tensor:
    """The sum of the values of each source's samples: [S]."""
    # Not multiplied by a mask, so that a sample whose loss is not finite shows in its own source alone; no scattered
    # adding, whose order, and so the result, a GPU leaves open.
    is_its_SN = sources_N == torch.arange(num_sources, device=sources_N.device)[:, None]
    return torch.where(is_its_SN, values_N, 0.0).sum(dim=1)
