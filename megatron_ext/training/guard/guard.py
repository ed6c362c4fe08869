"""The judge of a run's steps: which are skipped, from where the run goes back, and when it must stop."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_ext.config import GuardConfig
from megatron_ext.errors import TrainingError
from megatron_ext.monitoring.events import Event, Tell
from megatron_ext.training.guard.audit import AUDIT_KEY, AuditLog
from megatron_ext.training.hooks.base import Hook, StepDone
from megatron_ext.training.verdict import NO_LABEL, Figures, Skip, Take, Verdict

if TYPE_CHECKING:
    from megatron_ext.training.session import Session


class Guard(Hook):
    """Judges every step (a `Judge`), and remembers what it must in checkpoints (a `Hook`).

    All it decides by is the same on every rank and in its state, so that a resumed run decides as an uninterrupted one.

    Args:
        settings: the run's section `guard`.
        tell: told of what happens; on every rank.
    """

    name = "guard"

    def __init__(self, settings: GuardConfig, tell: Tell) -> None:
        self._settings, self._tell = settings, tell
        self._audit = AuditLog()
        self._nonfinite_in_row = 0
        self._session: Session | None = None

    def on_start(self, session: "Session") -> None:
        """Judge the steps of `session` from now on."""
        self._session = session

    def __call__(self, figures: Figures) -> Verdict:
        """See `Judge`."""
        losses = figures.values()
        if not all(map(math.isfinite, (*losses.values(), figures.grad_norm))) or not float(figures.units):
            return self._nonfinite(losses, figures)
        self._nonfinite_in_row = 0
        return Take()

    def after_step(self, session: "Session", done: StepDone) -> None:
        """Note in the audit log what was not a plain step."""
        if isinstance(done.verdict, Skip):
            samples = {"first_sample": done.first_sample, "last_sample": session.state.consumed_samples - 1}
            self._audit.add("skip", done.iteration, done.verdict.reason, samples)

    def _nonfinite(self, losses: Mapping[str, float], figures: Figures) -> Verdict:
        """What becomes of a step with a loss or gradient that is not finite, or with none."""
        self._nonfinite_in_row += 1
        if not float(figures.units):
            why = NO_LABEL
        else:
            first = figures.first_nonfinite()
            values = ", ".join(f"{name} {value:g}" for name, value in losses.items())
            why = f"{values}, gradient norm {figures.grad_norm:g}; {first.text}"
            details = {**losses, "grad_norm": figures.grad_norm, **self._samples(first.details)}
            self._event("nonfinite", f"not finite: {why}", details)
        most = self._settings.max_nonfinite_in_row
        if self._nonfinite_in_row > most:
            row = f"{self._nonfinite_in_row} steps in a row, this one" if most else "it"
            raise TrainingError(
                f"{why}; the weights were not updated. guard.max_nonfinite_in_row = {most}: {row} could not be taken. "
                "Start again to go on from the newest checkpoint, past these steps (train.skip_steps) or with a lower "
                "optimizer.lr"
            )
        return Skip(why if not float(figures.units) else "not finite")

    def _samples(self, details: Mapping[str, Any]) -> dict[str, Any]:
        """`details` with the numbers of the samples of the micro-batch that they name, and their sources."""
        number, session = details.get("micro_batch"), self._session
        if number is None or session is None:
            return dict(details)
        rows = session.plan.stage_of_step(session.state.iteration).micro_batch_size
        first = session.state.consumed_samples + number * rows
        places = [session.stream.place(sample) for sample in range(first, first + rows)]
        return {**details, "samples": [first, first + rows - 1], "sources": sorted({one.source for one in places})}

    def _event(self, kind: str, text: str, details: Mapping[str, Any]) -> None:
        """Tell of the step that is on its way, and note it."""
        assert self._session is not None
        step = self._session.state.iteration + 1
        self._audit.add(kind, step, text, details)
        self._tell(Event(kind, step, text, details))

    def state(self) -> Mapping[str, Any]:
        """What it decides by, and the audit log."""
        return {"guard": {"nonfinite_in_row": self._nonfinite_in_row}, AUDIT_KEY: self._audit.entries()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as the run did that was saved; one saved by an older version begins with an empty memory."""
        saved = state.get("guard", {})
        self._nonfinite_in_row = int(saved.get("nonfinite_in_row", 0))
        self._audit.restore(state.get(AUDIT_KEY, []))
