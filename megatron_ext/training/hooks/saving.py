"""Saves every checkpoint.save_interval steps, at both ends of a run, and before a signal ends it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_ext.checkpoint.find import iteration_of
from megatron_ext.checkpoint.finite import NotFiniteError
from megatron_ext.checkpoint.save import Outcome
from megatron_ext.config import CheckpointConfig
from megatron_ext.errors import CheckpointError
from megatron_ext.monitoring.clock import Clock
from megatron_ext.monitoring.events import Event, Tell
from megatron_ext.monitoring.metrics_file import is_untold
from megatron_ext.planning.amounts import size
from megatron_ext.training.hooks.base import Hook, StepDone
from megatron_ext.training.session import Session
from megatron_ext.training.verdict import Rollback


class Saving(Hook):
    """Comes last of all hooks, so that what the others did after the step is saved with it.

    A save that fails is told, and made up for by the next one; not so the last one of a run. The next save waits for
    the one before.

    Args:
        records: the metrics file.
        tell: takes what became of each save.
        others: told of each checkpoint that is complete, when every rank knows.
    """

    def __init__(
        self, settings: CheckpointConfig, records: Path, clock: Clock, tell: Tell, others: Sequence[Hook]
    ) -> None:
        self._settings, self._records, self._clock, self._tell = settings, records, clock, tell
        self._others = others
        self._session: Session | None = None
        self._told: Outcome | None = None
        self._is_last = False
        """Whether no later save can make up for one that fails."""

    def on_start(self, session: Session) -> None:
        """Make up for what was not told, and save a run that is new, where that is asked for."""
        self._session = session
        self._tell_untold(session)
        if self._settings.save_initial and session.checkpoints.newest() is None:
            with self._clock.stopped():
                self._save(session, session.state.iteration, is_last=False)

    def after_step(self, session: Session, done: StepDone) -> None:
        """Save where it is time to, and tell what has become of the save before."""
        if (outcome := session.checkpoints.outcome()) is not None:
            self._tell_once(outcome)
        self._tell_copies(session, done.iteration)
        # A run that went back says so on disk at once: it would go on from what it went back from.
        if done.signal or isinstance(done.verdict, Rollback) or done.is_due(self._settings.save_interval):
            with self._clock.stopped():
                self._save(session, done.iteration, is_last=bool(done.signal) or done.iteration >= done.last)
        self._tell_settled(session)

    def figures(self) -> Mapping[str, float]:
        """How many steps the second place is behind, where there is one."""
        lag = self._session.checkpoints.lag() if self._session is not None else None
        return {} if lag is None else {"checkpoint_lag_steps": lag}

    def on_error(self, error: BaseException) -> None:
        """What is on its way to the disk is the state before the failure, and worth waiting for."""
        if isinstance(error, Exception) and self._session is not None:
            self._session.checkpoints.close_alone()

    def _save(self, session: Session, iteration: int, *, is_last: bool) -> None:
        checkpoints = session.checkpoints
        checkpoints.settle()
        self._tell_settled(session)
        self._is_last = is_last
        try:
            session.stage()
        except NotFiniteError:
            raise
        except CheckpointError as error:
            self._tell_failure(error, iteration)
            if is_last:
                raise
            return
        if is_last or not self._settings.async_save:
            outcome = checkpoints.settle()
            self._tell_settled(session)
            if is_last and outcome is not None and outcome.error is not None:
                raise outcome.error
        if is_last:
            try:
                checkpoints.close()
            finally:
                self._tell_copies(session, iteration)

    def _tell_settled(self, session: Session) -> None:
        """Tell of what every rank knows by now."""
        for outcome in session.checkpoints.settled():
            self._tell_once(outcome)
            if outcome.error is None:
                for hook in self._others:
                    hook.after_save(outcome.checkpoint)

    def _tell_once(self, outcome: Outcome) -> None:
        """Tell of a save as of the step that it has, however much later it is known."""
        if self._told is not None and self._told.iteration == outcome.iteration:
            return
        self._told = outcome
        if outcome.error is not None:
            self._tell_failure(outcome.error, outcome.iteration)
            return
        seconds = {"stalled_seconds": outcome.stalled, "seconds": outcome.seconds}
        text = (
            f"saved {outcome.checkpoint} ({size(outcome.bytes)}; training waited {outcome.stalled:.1f} s, it was "
            f"complete after {outcome.seconds:.1f} s)"
        )
        details = {"checkpoint": str(outcome.checkpoint), "bytes": outcome.bytes, **seconds}
        if (lag := self._session.checkpoints.lag() if self._session is not None else None) is not None:
            details["checkpoint_lag"] = lag
        self._tell(Event("checkpoint", outcome.iteration, text, details))

    def _tell_untold(self, session: Session) -> None:
        """Tell of the checkpoint that the run goes on from, where a kill came between completing it and telling."""
        if dist.get_rank() != 0 or (newest := session.checkpoints.newest()) is None:
            return
        if is_untold(self._records, iteration_of(newest)):
            written = sum(path.stat().st_size for path in newest.glob("*.distcp"))
            text = f"saved {newest} ({size(written)}; the run was ended before it could say so)"
            self._tell(Event("checkpoint", iteration_of(newest), text, {"checkpoint": str(newest), "bytes": written}))

    def _tell_copies(self, session: Session, iteration: int) -> None:
        for copy in session.checkpoints.copied():
            name, details = copy.checkpoint.name, {"seconds": copy.seconds, "checkpoint_lag": copy.lag}
            if copy.error is None:
                text = f"copied {name} to {copy.place} ({copy.seconds:.1f} s; it is {copy.lag} steps behind)"
                self._tell(Event("checkpoint_copied", iteration, text, details))
            else:
                why = " ".join(str(copy.error).split())
                text = f"{why}. It is tried again; the second place is {copy.lag} steps behind"
                self._tell(Event("checkpoint_failed", iteration, text, {"why": why, **details}))

    def _tell_failure(self, error: CheckpointError, iteration: int) -> None:
        why = " ".join(str(error).split())
        again = "It is tried again at the next step that saves; until then the run has the checkpoints before"
        text = f"{why}. {'The run ends without it' if self._is_last else again}"
        self._tell(Event("checkpoint_failed", iteration, text, {"why": why}))
