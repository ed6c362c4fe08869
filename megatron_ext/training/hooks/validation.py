"""Validates every train.eval_interval steps and after the last of each stage, on the same samples each time."""

import logging
from collections.abc import Callable

from megatron_ext.config import TrainConfig
from megatron_ext.data.stream.position import Position
from megatron_ext.data.stream.stream import DataStream
from megatron_ext.monitoring.clock import Clock
from megatron_ext.monitoring.sources import ValidationReport
from megatron_ext.training.hooks.base import Hook, StepDone
from megatron_ext.training.session import Session

log = logging.getLogger(__name__)


class Validation(Hook):
    """Every rank validates its share.

    Args:
        stream: stands at its beginning, and is put back there each time.
        tell: told the step and the losses, on every rank.
    """

    def __init__(
        self, train: TrainConfig, stream: DataStream, clock: Clock, tell: Callable[[int, ValidationReport], None]
    ) -> None:
        self._train, self._stream, self._clock, self._tell = train, stream, clock, tell

    def on_start(self, session: Session) -> None:
        """Say how many samples each source is validated on."""
        self._stream.seek(Position(self._train.eval_iters * self._train.global_batch_size))
        samples = {name: use.samples for name, use in self._stream.consumption().sources.items()}
        self._stream.seek(Position())
        if len(samples) > 1:
            log.info("validation on %s samples", ", ".join(f"{count} {name}" for name, count in samples.items()))
        if unseen := [name for name, count in samples.items() if not count]:
            log.warning(
                "validation says nothing of %s, whose share of %d samples is none: raise train.eval_iters, or its "
                "weight in data.validation",
                ", ".join(unseen),
                sum(samples.values()),
            )

    def after_step(self, session: Session, done: StepDone) -> None:
        """Validate where it is time to; a run that is told to stop does not."""
        if done.signal or not (done.ends_stage or done.is_due(self._train.eval_interval)):
            return
        with self._clock.stopped():
            names = list(self._stream.consumption().sources)
            batches = (self._stream.next() for _ in range(self._train.eval_iters))
            losses, sources = session.validate(batches, len(names))
            self._stream.seek(Position())  # this also ends what reads ahead
            known = {name: mean for name, (mean, _) in zip(names, sources, strict=True) if mean is not None}
            task = session.task
            loss = losses.pop(task.sums[0])
            # Besides a cross-entropy there is nothing in evaluation.
            others = {} if task.has_perplexity else losses
            report = ValidationReport(loss, known, others, has_perplexity=task.has_perplexity)
            self._tell(done.iteration, report)
