"""Saves every checkpoint.save_interval steps, after the last one, and before a signal ends the run."""

import logging
from collections.abc import Sequence

from megatron_ext.monitoring.clock import Clock
from megatron_ext.training.hooks.base import Hook, StepDone
from megatron_ext.training.session import Session
from megatron_ext.training.verdict import Rollback

log = logging.getLogger(__name__)


class Saving(Hook):
    """Comes last of all hooks, so that what the others did after the step is saved with it.

    Args:
        others: told of each checkpoint that is complete.
    """

    def __init__(self, interval: int | None, clock: Clock, others: Sequence[Hook]) -> None:
        self._interval, self._clock, self._others = interval, clock, others

    def after_step(self, session: Session, done: StepDone) -> None:
        """Save where it is time to."""
        # A run that went back says so on disk at once: it would go on from what it went back from.
        if not (done.signal or isinstance(done.verdict, Rollback) or done.is_due(self._interval)):
            return
        with self._clock.stopped():
            checkpoint = session.save()
            log.info("saved %s", checkpoint)
            for hook in self._others:
                hook.after_save(checkpoint)
