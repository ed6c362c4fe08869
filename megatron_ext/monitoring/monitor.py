"""The reports of a run, handed to every sink that is on. Only rank 0 has a monitor."""

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config import AlertsConfig, Layout, RunConfig, to_mapping
from megatron_ext.data.stream.plan import RunPlan
from megatron_ext.data.stream.position import Consumption
from megatron_ext.monitoring.clock import Clock
from megatron_ext.monitoring.description import describe_start
from megatron_ext.monitoring.events import STARTED, Event
from megatron_ext.monitoring.metrics_file import METRICS_FILE
from megatron_ext.monitoring.replay import WANDB_RUN, wandb_run_of
from megatron_ext.monitoring.sinks.base import Sink
from megatron_ext.monitoring.sinks.console import ConsoleSink
from megatron_ext.monitoring.sinks.jsonl import JsonlSink
from megatron_ext.monitoring.sources import ValidationReport, consumption_line
from megatron_ext.monitoring.step_report import StepReport, step_record
from megatron_ext.monitoring.throughput import Pace
from megatron_ext.planning.amounts import duration
from megatron_ext.planning.peaks import peak_tflops

__all__ = [
    "Monitor",
    "StepReport",
    "metrics_path",
    "new_run_id",
    "tell_of_failed_restart",
    "tell_of_failed_start",
]

_LOCK_SECONDS = 5.0


def metrics_path(run: RunConfig) -> Path:
    """The file that all metrics of `run` go to."""
    return Path(run.logging.metrics_file or Path(run.checkpoint.directory) / METRICS_FILE)


def new_run_id(run: RunConfig) -> str:
    """An identifier for the W&B run of `run`, which has no checkpoint; that of an earlier start without one, if any."""
    is_on = run.logging.wandb.mode != "off"
    earlier = wandb_run_of(metrics_path(run), to_mapping(run)) if is_on else None
    return earlier or secrets.token_hex(4)


class Monitor:
    """Receives reports and hands them on, with the throughput since the last one.

    Args:
        iteration: the step from which the run goes on.
        run_id: its identifier for W&B.

    Raises:
        EnvironmentFault: a sink needs a library that is not installed.
    """

    def __init__(
        self, run: RunConfig, layout: Layout, plan: RunPlan, iteration: int, run_id: str, clock: Clock
    ) -> None:
        self._plan = plan
        self._last = min(plan.total_steps, run.train.stop_at_iteration or plan.total_steps)
        self._iteration, self._began = iteration, time.monotonic()
        self._lock, self._is_closed = threading.Lock(), False
        self._sinks = open_sinks(run, iteration, run_id)
        peak = run.logging.peak_tflops
        if peak is None and torch.cuda.is_available():
            peak = peak_tflops(torch.cuda.get_device_name(), run.precision)
        self._pace = Pace(
            run,
            plan,
            clock,
            devices=layout.world_size,
            peak_tflops=peak,
            iteration=iteration,
            last=self._last,
        )
        how = f"continued at step {iteration}" if iteration else "started"
        processes = "1 process" if layout.world_size == 1 else f"{layout.world_size} processes"
        described = {"world_size": layout.world_size, **describe_start(run, layout)}
        if run.logging.wandb.mode != "off":
            described[WANDB_RUN] = run_id
        self.event(Event(STARTED, iteration, f"{how}, of {plan.total_steps} steps, on {processes}", described))

    def step(self, report: StepReport) -> None:
        """Report a training step."""
        self._iteration = report.iteration
        throughput = self._pace.measure(report.iteration)
        left = self._pace.seconds_left(report.iteration, throughput.seconds_per_step)
        record = step_record(report, self._plan, throughput, self._plan.total_steps, left)
        with self._locked():
            for sink in self._sinks:
                sink.step(record)

    def passed_over(self, first: int, last: int) -> None:
        """Nothing was computed in the steps from `first` to before `last`."""
        self._pace.pass_over(first, last)

    def validation(self, iteration: int, report: ValidationReport) -> None:
        """Report a validation."""
        with self._locked():
            for sink in self._sinks:
                sink.validation(iteration, report)

    def stage_ended(self, iteration: int, consumption: Consumption) -> None:
        """Say what was read of each source until the end of a stage; nothing where there is one only."""
        if consumption.stage is not None:
            self.event(Event("stage", iteration, f"stage {consumption.stage} is over: {consumption_line(consumption)}"))

    def event(self, event: Event) -> None:
        """Hand on what happened besides steps; from any thread. Alerts of errors are sent when it returns.

        After the end, which the watchdog's thread may have told of before the main one, nothing more.
        """
        with self._locked():
            sinks = () if self._is_closed else self._sinks
            for sink in sinks:
                sink.event(event)
            for sink in sinks if event.severity == "error" else ():  # with which the run ends, and maybe this process
                sink.flush()

    def ended(self, iteration: int, signal: str | None) -> None:
        """Say how the run has ended, after so many steps, and finish all records.

        Args:
            signal: the name of what stopped it: a signal, or train.exit_at.
        """
        took, steps = duration(time.monotonic() - self._began), self._plan.total_steps
        if signal is not None:
            event = Event("stopped", iteration, f"stopped by {signal} at step {iteration} of {steps}, after {took}")
        elif iteration < steps:
            event = Event("stopped", iteration, f"stopped as asked at step {iteration} of {steps}, after {took}")
        else:
            event = Event("finished", iteration, f"finished all {steps} steps, after {took} in this job")
        self.event(event)
        self.close()

    def failed(self, error: BaseException) -> None:
        """Say that the run has ended with `error`, and finish all records."""
        self.event(Event("failed", self._iteration, f"failed: {described(error)}", {"error": type(error).__name__}))
        self.close(failed=True)

    def close(self, *, failed: bool = False) -> None:
        """Finish all records, once."""
        with self._locked():
            sinks, self._is_closed = [] if self._is_closed else self._sinks, True
            for sink in sinks:
                sink.close(failed=failed)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One thread after the other; but where one hangs, such as in a file system, another may still speak."""
        is_ours = self._lock.acquire(timeout=_LOCK_SECONDS)
        try:
            yield
        finally:
            if is_ours:
                self._lock.release()


def open_sinks(run: RunConfig, iteration: int, run_id: str) -> list[Sink]:
    """The sinks that are on in `run`; those that are off are not imported."""
    directory, configuration = Path(run.checkpoint.directory), to_mapping(run)
    sinks: list[Sink] = [
        ConsoleSink(shows_steps=run.logging.console),
        JsonlSink(metrics_path(run), iteration),
    ]
    if run.logging.tensorboard_directory is not None:
        from megatron_ext.monitoring.sinks.tensorboard import TensorboardSink

        sinks.append(TensorboardSink(Path(run.logging.tensorboard_directory), iteration, configuration))
    others = []
    if run.logging.wandb.mode != "off":
        from megatron_ext.monitoring.sinks.wandb import WandbSink

        wandb = WandbSink(run.logging.wandb, run_id, directory, configuration, metrics_path(run), iteration)
        sinks.append(wandb)
        others = [wandb] if run.alerts.wandb else []
    if run.alerts.webhook is not None or run.alerts.email is not None or others:
        from megatron_ext.monitoring.sinks.alerts import AlertsSink

        # Before W&B, whose run ends with its own closing; and before the files, of which one may hang: that is told.
        sinks.insert(0, AlertsSink(run.alerts, directory, metrics_path(run), others))
    return sinks


def tell_of_failed_start(run: RunConfig, error: BaseException) -> None:
    """Alert of a run that ends with `error` before it has a monitor, as far as that needs no W&B run."""
    _alert_of_failed_start(run.alerts, Path(run.checkpoint.directory), metrics_path(run), error)


def _alert_of_failed_start(settings: AlertsConfig, directory: Path, records: Path, error: BaseException) -> None:
    if settings.webhook is not None or settings.email is not None:
        from megatron_ext.monitoring.sinks.alerts import AlertsSink

        alerts = AlertsSink(settings, directory, records, is_runs=False)
        alerts.event(Event("failed", 0, f"failed before its first step: {described(error)}"))
        alerts.close(failed=True)


def tell_of_failed_restart(values: Mapping[str, Any], error: BaseException) -> None:
    """Alert of a run that has reported before and does not go on: nobody watches a restart.

    Args:
        values: what is right in its configuration (`RunText.values`), which may be what is wrong with it.
    """
    alerts, directory = values.get("alerts"), values.get("checkpoint.directory")
    if alerts is None or directory is None:
        return
    records = Path(values.get("logging.metrics_file") or Path(directory) / METRICS_FILE)
    if records.is_file():
        _alert_of_failed_start(alerts, Path(directory), records, error)


def described(error: BaseException) -> str:
    """An error in one text: what was written for people, or its type and what it says."""
    said = str(error).strip()
    if isinstance(error, SystemExit):
        return f"exit code {said}"
    return (
        said
        if type(error).__module__.startswith("megatron_ext") and said
        else f"{type(error).__name__}: {said}".rstrip(": ")
    )
