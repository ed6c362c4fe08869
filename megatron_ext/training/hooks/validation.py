"""Validates every train.eval_interval steps and after the last of each stage, on the same samples each time."""

from collections.abc import Callable

from megatron_ext.config import TrainConfig
from megatron_ext.data.stream.position import Position
from megatron_ext.data.stream.stream import DataStream
from megatron_ext.monitoring.clock import Clock
from megatron_ext.training.hooks.base import Hook, StepDone
from megatron_ext.training.session import Session


class Validation(Hook):
    """Every rank validates its share.

    Args:
        stream: stands at its beginning, and is put back there each time.
        tell: told the step and the loss, on every rank.
    """

    def __init__(
        self, train: TrainConfig, stream: DataStream, clock: Clock, tell: Callable[[int, float], None]
    ) -> None:
        self._train, self._stream, self._clock, self._tell = train, stream, clock, tell

    def after_step(self, session: Session, done: StepDone) -> None:
        """Validate where it is time to; a run that is told to stop does not."""
        if done.signal or not (done.ends_stage or done.is_due(self._train.eval_interval)):
            return
        with self._clock.stopped():
            loss = session.validate(self._stream.next() for _ in range(self._train.eval_iters))
            self._stream.seek(Position())  # this also ends what reads ahead
            self._tell(done.iteration, loss)
