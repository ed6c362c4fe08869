"""Has a command beside the run evaluate each checkpoint: never waited for, never lost, one at a time."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from megatron_ext.checkpoint.collective import on_first_rank_slowly
from megatron_ext.checkpoint.find import complete_checkpoints, is_checkpoint, iteration_of
from megatron_ext.config import EvaluationConfig
from megatron_ext.monitoring.events import EVALUATION, Event, Tell
from megatron_ext.monitoring.kept_results import evaluation_folder
from megatron_ext.monitoring.metrics_file import read_evaluated
from megatron_ext.training.hooks.base import Hook, StepDone
from megatron_ext.training.hooks.side_process import EvaluationError, SideProcess
from megatron_ext.training.session import Session

_LOOK = 0.2
_SAID = 20
"""Results in one line for people."""


class Evaluating(Hook):
    """Works on the first rank alone. What was evaluated, the metrics file says; the rest is made up for on a resume.

    Args:
        directory: of the checkpoints.
        metrics: the metrics file.
        tell: takes what became of each.
    """

    def __init__(self, settings: EvaluationConfig, directory: Path, metrics: Path, tell: Tell) -> None:
        self._settings, self._directory, self._metrics, self._tell = settings, directory, metrics, tell
        self._waiting: list[Path] = []
        """Oldest first."""
        self._running: SideProcess | None = None
        self._newest = self._iteration = 0
        """The step of the newest checkpoint, and that of the run."""
        self._is_stopped = False
        """A signal ends the run: nothing is waited for."""

    def on_start(self, session: Session) -> None:
        """Take up what was not evaluated before."""
        self._iteration = session.state.iteration
        if dist.get_rank() == 0:
            session.checkpoints.keep(self.in_use)
            done = read_evaluated(self._metrics)
            there = complete_checkpoints(self._directory)
            self._newest = iteration_of(there[-1]) if there else 0
            self._waiting = [one for one in there if iteration_of(one) not in done]
            self._look()

    def after_step(self, session: Session, done: StepDone) -> None:
        """Tell what is over, and start what is next."""
        self._iteration, self._is_stopped = done.iteration, bool(done.signal)
        if dist.get_rank() == 0 and not self._is_stopped:
            self._look()

    def after_save(self, checkpoint: Path) -> None:
        """It is the next one."""
        if dist.get_rank() == 0:
            self._newest = iteration_of(checkpoint)
            self._waiting.append(checkpoint)
            if not self._is_stopped:
                self._look()

    def figures(self) -> Mapping[str, float]:
        """Steps from the oldest checkpoint that is not evaluated to the newest."""
        left = [self._running.checkpoint] if self._running is not None else self._waiting[:1]
        return {"evaluation_lag_steps": self._newest - iteration_of(left[0]) if left else 0}

    def in_use(self) -> list[Path]:
        """Checkpoints that must stay for now; from any thread."""
        running, waiting, most = self._running, list(self._waiting), self._settings.keep_waiting
        return [*([running.checkpoint] if running else []), *waiting[max(len(waiting) - most, 0) :]]

    def on_error(self, error: BaseException) -> None:
        """What goes on is ended; it begins anew when the run goes on."""
        self._end()

    def close(self) -> None:
        """Of a run that is over, evaluate what is left; one that was stopped does that when it goes on."""
        try:
            if not self._is_stopped:
                on_first_rank_slowly(self._finish, "the run is saved, but not every checkpoint is evaluated")
        finally:
            self._end()

    def _finish(self) -> None:
        while self._running is not None or self._waiting:
            self._look()
            time.sleep(_LOOK)

    def _end(self) -> None:
        if self._running is not None:
            self._running.end()
            self._running = None

    def _look(self) -> None:
        """Tell what has become of the one that runs, and start the next."""
        if self._running is not None and (failure := self._running.outcome()) is not None:
            self._report(self._running, failure)
            self._running = None
        while self._running is None and self._waiting:
            self._start(self._waiting[0])
            del self._waiting[0]  # only now, so that it is always in use

    def _start(self, checkpoint: Path) -> None:
        if not is_checkpoint(checkpoint):
            text = (
                f"{checkpoint.name} was removed before its evaluation began: the command of evaluation.on_checkpoint "
                "takes longer than the run from checkpoint to checkpoint; raise checkpoint.save_interval, "
                "checkpoint.keep_last or evaluation.keep_waiting"
            )
            self._tell(Event("evaluation_failed", self._iteration, text, {"checkpoint": str(checkpoint)}))
            return
        assert self._settings.on_checkpoint is not None
        folder, step = evaluation_folder(checkpoint), iteration_of(checkpoint)
        try:
            self._running = SideProcess(
                self._settings.on_checkpoint, checkpoint, step, folder, 60 * self._settings.timeout_minutes
            )
        except (OSError, ValueError) as error:  # ValueError: a NUL in the command
            text = f"the evaluation of {checkpoint.name} did not start: {error}; it is tried again when the run goes on"
            self._tell(Event("evaluation_failed", self._iteration, text, {"checkpoint": str(checkpoint)}))

    def _report(self, process: SideProcess, failure: str) -> None:
        name, seconds = process.checkpoint.name, process.seconds
        details = {
            "checkpoint": str(process.checkpoint),
            "folder": str(process.folder),
            "seconds": seconds,
            "lag_steps": self._newest - process.step,
        }
        results: dict[str, float] = {}
        if not failure:
            try:
                results = process.results()
            except EvaluationError as error:
                failure = str(error)
        if failure:
            text = f"the evaluation of {name} failed: {failure}; it is tried again when the run goes on"
            self._tell(Event("evaluation_failed", self._iteration, text, details))
            return
        said = ", ".join(f"{key} {value:.4g}" for key, value in list(results.items())[:_SAID])
        said += f" and {len(results) - _SAID} more" if len(results) > _SAID else ""
        text = f"evaluated {name} in {seconds:.0f} s ({details['lag_steps']} steps behind): {said}"
        self._tell(Event(EVALUATION, process.step, text, {"results": results, **details}))
