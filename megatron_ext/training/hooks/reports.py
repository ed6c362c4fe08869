"""Brings together what all ranks know of the steps, and has rank 0 report it."""

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.config import Layout, RunConfig
from megatron_ext.data.stream.position import Consumption
from megatron_ext.errors import TrainingError
from megatron_ext.mcore.model import routers
from megatron_ext.mcore.moe.metrics import ExpertStatistics, collect_statistics
from megatron_ext.monitoring.clock import Clock
from megatron_ext.monitoring.events import Event
from megatron_ext.monitoring.monitor import Monitor, StepReport, new_run_id, tell_of_failed_start
from megatron_ext.monitoring.sources import SourceReport, ValidationReport
from megatron_ext.monitoring.step_times import StepTimes
from megatron_ext.training.hooks.base import Hook, StepDone
from megatron_ext.training.session import Session
from megatron_ext.training.signals import stop_name
from megatron_ext.training.step import SourceSums
from megatron_ext.training.verdict import Rollback, Skip, Take

_PARTS = ("data", "forward_backward", "optimizer", "reports", "validation", "saving")
"""What a step's time is reported by."""


class Reports(Hook):
    """Reports every logging.log_interval steps and after the last one of each stage.

    Its state is the W&B run that a run goes on with.
    """

    name = "reports"

    def __init__(self, run: RunConfig, layout: Layout, clock: Clock) -> None:
        self._run, self._layout, self._clock = run, layout, clock
        self._run_id = ""
        """Set on the first rank, which alone reports, and in every checkpoint."""
        self._monitor: Monitor | None = None
        """On rank 0, while the run goes on."""
        self._micro_batches = 0
        """Those of all ranks computed since the last report, over which it averages."""
        self._sources: SourceSums | None = None
        self._taken = 0
        """What the sources gave to the steps taken since the last report, and how many those are."""
        self._times: StepTimes | None = None
        """On rank 0, whose times are reported."""
        self._iteration = self._signal = 0
        """Steps done, and the signal that ends the run."""
        self._reported, self._next, self._reported_at = 0, 0, 0.0
        """The step of the last report, that of the next one by seconds, and when the last one was."""
        self._passed = 0
        """Steps since the last report in which nothing was computed."""

    def on_start(self, session: Session) -> None:
        """Open what is reported to."""
        self._iteration = self._reported = session.state.iteration
        self._next = self._reported + self._run.logging.log_interval
        self._reported_at = time.monotonic()
        if dist.get_rank() == 0:
            self._run_id = self._run_id or new_run_id(self._run)
            self._monitor = Monitor(
                self._run, self._layout, session.plan, session.state.iteration, self._run_id, self._clock
            )
            self._times = StepTimes(session.device)
            session.mark = self._times.mark

    def after_step(self, session: Session, done: StepDone) -> None:
        """Report where it is time to, and every step that was skipped."""
        if done.result is None or isinstance(done.verdict, Rollback):
            self._passed += done.iteration - self._iteration
            if self._monitor is not None:
                self._monitor.passed_over(self._iteration, done.iteration)
        self._iteration, self._signal = done.iteration, done.signal
        if isinstance(done.verdict, Skip):
            samples = {"first_sample": done.first_sample, "last_sample": session.state.consumed_samples - 1}
            passed = "passed over, with samples {first_sample} to {last_sample}".format(**samples)
            self.event(Event("skip", done.iteration, f"{passed} ({done.verdict.reason})", samples))
        if done.result is not None:
            self._note(session, done)
            if isinstance(done.verdict, Take) and self._is_due(done):
                self._report(session, done)
        if self._monitor is not None and done.ends_stage:
            self._monitor.stage_ended(done.iteration, session.stream.consumption())

    def _is_due(self, done: StepDone) -> bool:
        """Whether to report; the same on every rank, which has read no clock for it since the last report."""
        if done.signal or done.ends_stage or done.is_due(None):
            return True
        if self._run.logging.log_interval_seconds is None:
            return done.is_due(self._run.logging.log_interval)
        return done.iteration >= self._next

    def _agree_on_next(self, iteration: int, seconds_per_step: float) -> None:
        """Set the step of the next report, by what a step took the slowest rank."""
        settings = self._run.logging
        steps = round((settings.log_interval_seconds or 0.0) / max(seconds_per_step, 1e-9))
        self._next = iteration + max(settings.log_interval, steps)

    def _note(self, session: Session, done: StepDone) -> None:
        """Count what a step that was taken computed, over which the next report averages."""
        assert done.result is not None
        if isinstance(done.verdict, Take):  # routers forget what they counted in others
            stage = session.plan.stage_of_sample(done.first_sample)
            self._micro_batches += stage.global_batch_size // stage.micro_batch_size
            seen = done.result.sources
            self._sources = seen if self._sources is None else self._sources + seen
            self._taken += 1

    def validation(self, iteration: int, report: ValidationReport) -> None:
        """Report a validation; on every rank."""
        if self._monitor is not None:
            self._monitor.validation(iteration, report)

    def event(self, event: Event) -> None:
        """Note what happened besides steps; may be called on any rank."""
        if self._monitor is not None:
            self._monitor.event(event)

    def on_error(self, error: BaseException) -> None:
        """Say so, and finish all records as those of a run that failed."""
        if self._monitor is not None:
            self._monitor.failed(error)
        elif dist.get_rank() == 0:
            tell_of_failed_start(self._run, error)

    def on_stall(self, event: Event, *, ends: bool) -> None:
        """Say so in all records, and why the run ends."""
        self.event(event)
        if ends:
            self.on_error(TrainingError(event.text))

    def close(self) -> None:
        """Say how the run ended and finish all records."""
        if self._monitor is not None:
            self._monitor.ended(self._iteration, stop_name(self._signal) if self._signal else None)

    def state(self) -> Mapping[str, Any]:
        """The W&B run."""
        return {"wandb_run_id": self._run_id}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with the W&B run of the checkpoint, if it has one."""
        if not isinstance(run_id := state.get("wandb_run_id"), str | None):
            raise ValueError(f"wandb_run_id is {run_id!r}")
        self._run_id = run_id or self._run_id

    def _report(self, session: Session, done: StepDone) -> None:
        """Bring together what all ranks know and hand it to the monitor; every rank must call this."""
        assert done.result is not None
        losses = {name: float(mean) for name, mean in done.result.losses.items()}
        experts = expert_statistics(session, self._micro_batches)
        now, done_since = time.monotonic(), max(done.iteration - self._reported - self._passed, 1)
        pace = (now - self._reported_at) / done_since
        self._reported, self._reported_at, self._passed = done.iteration, now, 0
        memory, (slowest,) = largest_memory(session, [pace])
        self._agree_on_next(done.iteration, slowest)
        consumed, steps = session.stream.consumption(), self._taken
        sources = self._source_reports(consumed)
        self._micro_batches = self._taken = 0
        if self._monitor is not None:
            rate = session.learning_rate(done.iteration - 1)
            report = StepReport(
                iteration=done.iteration,
                losses=losses,
                learning_rate=rate,
                grad_norm=done.result.grad_norm,
                consumed_samples=session.state.consumed_samples,
                memory_bytes=memory.pop("peak"),
                experts=experts,
                sources=sources,
                steps=steps,
                stage=consumed.stage,
                memory=memory,
                step_seconds=self._step_seconds(done_since),
                has_perplexity=session.task.has_perplexity,
                figures={name: value for hook in session.hooks for name, value in hook.figures().items()},
            )
            self._monitor.step(report)

    def _step_seconds(self, steps: int) -> dict[str, float]:
        """What each of the last `steps` steps took on rank 0, by part."""
        assert self._times is not None
        parts: dict[str, float] = {}
        for part, seconds in self._times.read().items():
            name = part if part in _PARTS else "other"  # hooks that only look
            parts[name] = parts.get(name, 0.0) + seconds / steps
        return {name: round(seconds, 7) for name, seconds in parts.items()}

    def _source_reports(self, consumed: Consumption) -> dict[str, SourceReport]:
        """What there is to say of the sources that the run has read, since the last report; it begins anew."""
        assert self._sources is not None
        trained = zip(consumed.sources.items(), self._sources.read(), strict=True)
        self._sources = None
        return {
            name: SourceReport(loss, units / self._taken, use.tokens, use.epochs)
            for (name, use), (loss, units) in trained
            if use.samples
        }


def expert_statistics(session: Session, micro_batches: int) -> ExpertStatistics | None:
    """Routing over the last `micro_batches` of all ranks; None in a dense model. Every rank must call this."""
    model = session.run.model
    if not model.is_moe:
        return None
    assert model.num_moe_experts is not None
    return collect_statistics(
        routers(session.chunks),
        num_layers=model.num_layers,
        num_experts=model.num_moe_experts,
        num_microbatches=micro_batches,
        group=session.groups.world,
        device=session.device,
    )


def largest_memory(session: Session, others: Sequence[float]) -> tuple[dict[str, int], list[float]]:
    """The memory of the rank that uses most of it, in bytes by name, and the largest of `others` over all ranks.

    On CUDA device memory: `peak`, `allocated` and `reserved`; on CPU the `peak` of resident memory. Every rank must
    call this: one all-reduce over all of them.
    """
    if session.device.type == "cuda":
        used = {
            "peak": torch.cuda.max_memory_allocated(),
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
        }
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        used = {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    most = torch.tensor([*used.values(), *others], dtype=torch.float64, device=session.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=session.groups.world)
    values = most.tolist()
    return dict(zip(used, map(int, values), strict=False)), values[len(used) :]
