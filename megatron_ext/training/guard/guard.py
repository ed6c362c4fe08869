"""The judge of a run's steps: which are skipped, from where the run goes back, and when it must stop."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_ext.checkpoint.find import iteration_of
from megatron_ext.config import Fp8Precision, GuardConfig, ParallelConfig, RollbackConfig
from megatron_ext.errors import TrainingError
from megatron_ext.monitoring.events import Event, Tell
from megatron_ext.training.guard.audit import AUDIT_KEY, AuditLog
from megatron_ext.training.guard.gradient_event import gradient_event
from megatron_ext.training.guard.rollbacks import PastRollback, choose_checkpoint
from megatron_ext.training.guard.spikes import Excess, SpikeWindow
from megatron_ext.training.hooks.base import Hook, StepDone
from megatron_ext.training.verdict import NO_LABEL, Figures, Rollback, Skip, Take, Verdict

if TYPE_CHECKING:
    from megatron_ext.training.session import Session

_SKIPS_OF = 1000
"""Of so many steps at most spikes.max_skips are skipped."""
_ADVICE = (
    "Start again to go on from the newest checkpoint, past these steps (train.skip_steps) or with a lower optimizer.lr"
)


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
        self._skipped: list[int] = []
        """Steps skipped because they stood out, of the last thousand."""
        self._rollbacks: list[PastRollback] = []
        self._stage: int | None = None
        """First step of the data stage that the figures below are from: another has another loss."""
        self._begin_figures()

    def _begin_figures(self) -> None:
        self._spikes = None if self._settings.spikes is None else SpikeWindow(self._settings.spikes)
        self._excess = None if self._settings.rollback is None else Excess(self._settings.rollback)

    def on_start(self, session: "Session") -> None:
        """Judge the steps of `session` from now on; note that it starts, and what was changed since its checkpoint."""
        self._session = session
        step, run = session.state.iteration, session.run
        layout = {"world_size": session.layout.world_size, "parallel": layout_of(run.parallel)}
        processes = f"{session.layout.world_size} process{'es' if session.layout.world_size > 1 else ''}"
        text = f"{'goes on' if step else 'starts'} with {processes}, {layout['parallel']}"
        self._audit.add("start", step, text, layout)
        for key, old, new in session.levers:
            details = {"key": key, "old": old, "new": new}
            self._audit.add("lever", step, f"{key}: {old} -> {new}", details)
            self._tell(Event("lever", step, f"from here on {key}: {old} -> {new}", details))

    def rate_factor(self, step: int) -> float:
        """What the learning rate of `step`, counted from 0, is multiplied by: it rises anew after a rollback."""
        return math.prod(one.rate_factor(step) for one in self._rollbacks)

    def __call__(self, figures: Figures) -> Verdict:
        """See `Judge`."""
        self._step = self._session.state.iteration + 1
        stage = self._session.plan.stage_of_step(self._step - 1).first_step
        if stage != self._stage:
            self._stage = stage
            self._begin_figures()
        if (interval := self._settings.gradient_statistics_interval) and self._step % interval == 0:
            self._tell(gradient_event(self._session, self._step))
        losses = figures.values()
        # A batch without a label has no finite gradient either.
        if not all(map(math.isfinite, (*losses.values(), figures.grad_norm))):
            return self._nonfinite(losses, figures)
        self._nonfinite_in_row = 0
        loss = next(iter(losses.values()))
        found = None if self._spikes is None else self._spikes.judge(loss, figures.grad_norm)
        if self._settings.rollback is not None and self._excess is not None and (why := self._excess.note(loss)):
            return self._roll_back(self._settings.rollback, why, self._step - self._excess.steps)
        return Take() if found is None else self._spike(found, {**losses, "grad_norm": figures.grad_norm})

    def after_step(self, session: "Session", done: StepDone) -> None:
        """Note in the audit log which samples were passed over."""
        if isinstance(done.verdict, Skip | Rollback):
            samples = {"first_sample": done.first_sample, "last_sample": session.state.consumed_samples - 1}
            kind = "skip" if isinstance(done.verdict, Skip) else "passed over"
            self._audit.add(kind, done.iteration, done.verdict.reason, samples)

    def _nonfinite(self, losses: Mapping[str, float], figures: Figures) -> Verdict:
        """What becomes of a step with a loss or gradient that is not finite, or with none."""
        self._nonfinite_in_row += 1
        row, most = self._nonfinite_in_row, self._settings.max_nonfinite_in_row
        if not float(figures.units):
            why = short = NO_LABEL
        else:
            first, short = figures.first_nonfinite(), "not finite"
            values = ", ".join(f"{name} {value:g}" for name, value in losses.items())
            why = f"{values}, gradient norm {figures.grad_norm:g}; {first.text}"
            details = {**losses, "grad_norm": figures.grad_norm, **self._samples(first.details)}
            self._event("nonfinite", f"not finite: {why}", details)
        if row <= most:
            return Skip(short)
        if self._settings.rollback is not None:
            failed = f"{row} steps in a row were not taken: {short}"
            return self._roll_back(self._settings.rollback, failed, self._step - row)
        which = f"{row} steps in a row, this one the last," if most else "it"
        limit = f"guard.max_nonfinite_in_row = {most}: {which} could not be taken"
        raise self._stopped(f"{why}; the weights were not updated. {limit}", _ADVICE)

    def _spike(self, found: str, figures: Mapping[str, float]) -> Verdict:
        """What becomes of a step that stands out."""
        assert self._settings.spikes is not None
        most = self._settings.spikes.max_skips
        self._skipped = [step for step in self._skipped if step > self._step - _SKIPS_OF]
        if len(self._skipped) >= most:
            self._event("spike", f"{found}; taken, as {most} of the last {_SKIPS_OF} steps were skipped", figures)
            return Take()
        self._skipped.append(self._step)
        self._event("spike", found, figures)
        return Skip(found)

    def _roll_back(self, settings: RollbackConfig, why: str, before: int) -> Verdict:
        """Go back to before the run went wrong: `before` are the good steps."""
        session, stop = self._session, f"{why}; the weights were not updated"
        fp8 = ", or with precision.kind: bf16" if isinstance(session.run.precision, Fp8Precision) else ""
        advice = (
            f"Go on from an older checkpoint (move newer ones away) with half the optimizer.lr{fp8}, and look at the "
            "data since then: train.skip_steps passes over them"
        )
        if self._rollbacks and self._step - self._rollbacks[-1].step < settings.horizon:
            last = self._rollbacks[-1].step
            raise self._stopped(f"{stop}. The run went back at step {last} already (guard.rollback.horizon)", advice)
        newest = before - settings.min_steps_back
        session.checkpoints.settle()  # what is on its way to the disk may be it, and must not decide by when it arrives
        checkpoint = choose_checkpoint(session.checkpoints.directory, newest, self._rollbacks, session.groups.world)
        if checkpoint is None:
            back = f"guard.rollback.min_steps_back = {settings.min_steps_back}"
            raise self._stopped(
                f"{stop}. No checkpoint of step {max(newest, 0)} or before to go back to ({back})", advice
            )
        stage = session.plan.stage_of_step(self._step - 1)
        saved = iteration_of(checkpoint)
        resumed = max(self._step, min(saved + settings.pass_over_steps, stage.first_step + stage.steps))
        past = PastRollback(self._step, saved, resumed, settings.rewarm_steps)
        self._rollbacks.append(past)
        self._nonfinite_in_row = 0
        self._begin_figures()
        text = (
            f"{why}: back to {checkpoint.name}, past the data of steps {saved + 1} to {resumed}, and the learning rate "
            f"rises over {settings.rewarm_steps} steps"
        )
        self._event("rollback", text, past.to_json())
        return Rollback(why, checkpoint, resumed)

    def _stopped(self, why: str, advice: str) -> TrainingError:
        """What ends the run, after it was told of."""
        self._event("guard_stop", f"the run stops: {why}", {})
        return TrainingError(f"{why}. {advice}")

    def _samples(self, details: Mapping[str, Any]) -> dict[str, Any]:
        """`details` with the numbers of the samples of the micro-batch that they name, and their sources."""
        number, session = details.get("micro_batch"), self._session
        if number is None:
            return dict(details)
        rows = session.plan.stage_of_step(session.state.iteration).micro_batch_size
        first = session.state.consumed_samples + number * rows
        places = [session.stream.place(sample) for sample in range(first, first + rows)]
        return {**details, "samples": [first, first + rows - 1], "sources": sorted({one.source for one in places})}

    def _event(self, kind: str, text: str, details: Mapping[str, Any]) -> None:
        """Tell of the step that is on its way, and note it."""
        self._audit.add(kind, self._step, text, details)
        self._tell(Event(kind, self._step, text, details))

    def state(self) -> Mapping[str, Any]:
        """What it decides by, and the audit log."""
        memory = {
            "nonfinite_in_row": self._nonfinite_in_row,
            "skipped": list(self._skipped),
            "rollbacks": [one.to_json() for one in self._rollbacks],
            "stage": self._stage,
            "spikes": None if self._spikes is None else self._spikes.state(),
            "excess": None if self._excess is None else self._excess.state(),
        }
        return {"guard": memory, AUDIT_KEY: self._audit.entries()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as the run did that was saved; one saved by an older version begins with an empty memory."""
        saved = state.get("guard", {})
        self._nonfinite_in_row = int(saved.get("nonfinite_in_row", 0))
        self._skipped = [int(step) for step in saved.get("skipped", ())]
        self._rollbacks = [PastRollback.from_json(one) for one in saved.get("rollbacks", ())]
        self._stage = saved.get("stage")
        self._begin_figures()
        for figures, name in ((self._spikes, "spikes"), (self._excess, "excess")):
            if figures is not None and saved.get(name) is not None:
                figures.restore(saved[name])
        self._audit.restore(state.get(AUDIT_KEY, []))


def layout_of(parallel: ParallelConfig) -> str:
    """A layout in a few letters: TP2 PP4."""
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "EP": parallel.expert_model_parallel_size,
    }
    return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "data parallel alone"
