"""Weights & Biases: one run across interruptions, and no way for it to stop training."""

import contextlib
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_ext.config import WandbConfig
from megatron_ext.monitoring.alerts.message import Message
from megatron_ext.monitoring.events import EVALUATION, Event
from megatron_ext.monitoring.replay import EVALUATED, first_with_wandb, late, replay
from megatron_ext.monitoring.sinks.wandb_files import recorded_until, remove_empty
from megatron_ext.monitoring.sources import ValidationReport, validation_panels
from megatron_ext.monitoring.step_report import StepRecord, step_panels_of

log = logging.getLogger(__name__)

# Without a limit wandb waits at the end until the network is back, and the job with it.
_FINISH_SECONDS = 60
# wandb 0.31 does not hold to its own limit while an alert is on its way.
_FINISH_MARGIN_SECONDS = 5


class WandbSink:
    """A W&B run; nothing more where it failed. Credentials come from WANDB_API_KEY or `wandb login`.

    W&B takes each step once: what it has of steps after the checkpoint that the run goes on from stays, and what it
    lacks up to there, because its own process was killed or the network was away, is reported again.

    Args:
        metrics: the run's metrics file, which has each step up to `iteration` once.
        iteration: the step from which the run goes on.
    """

    name = "W&B"
    key = "wandb"

    def __init__(
        self,
        settings: WandbConfig,
        run_id: str,
        directory: Path,
        configuration: Mapping[str, Any],
        metrics: Path,
        iteration: int,
    ) -> None:
        self._run: Any = None
        self._held, self._step = -1, iteration
        """The last step that W&B has of earlier starts, and the one that reports have come to."""
        self._row: dict[str, Any] = {}
        """What is known of that step. W&B takes a row once, so that it gets it when nothing more can come."""
        folder = _folder(settings, directory)
        recorded = recorded_until(folder, run_id)
        remove_empty(folder, run_id)
        modes: list[Literal["online", "offline"]] = ["offline"] if settings.mode == "offline" else ["online", "offline"]
        for mode in modes:
            try:
                self._run = _start(settings, mode, run_id, directory, configuration)
            except Exception as error:  # noqa: BLE001 - whatever W&B does, training goes on
                log.warning("W&B could not start in mode %s: %s", mode, error)
                continue
            if mode != settings.mode:
                kept = Path(self._run.dir).parent  # the folder of this run, above that of its files
                log.warning("W&B is recorded offline; send it later with: wandb sync %s", kept)
            # Online its server knows: that of the next step.
            held = int(self._run.starting_step) - 1 if mode == "online" else recorded
            # Without any files there was no earlier start, or somebody has sent and removed what it left.
            self._held = iteration if held is None else held
            self._make_up(metrics, iteration)
            return
        log.warning("training goes on without W&B; everything is in the metrics file")

    def step(self, record: StepRecord) -> None:
        """Everything that is drawn."""
        self.log(step_panels_of(record.values), record.report.iteration)

    def validation(self, iteration: int, report: ValidationReport) -> None:
        """Loss and perplexity, in all and by source."""
        self.log(validation_panels(report), iteration)

    def event(self, event: Event) -> None:
        """Its numbers; of the rest W&B is told by alerts."""
        if event.kind == EVALUATION:
            self.log(late(event.panels, event.iteration), max(self._step, self._held + 1))
        elif event.panels:
            self.log(event.panels, event.iteration)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Report `values` for `step`, unless W&B has it."""
        if self._run is None or step <= self._held or step < self._step:
            return
        if step > self._step:
            self._send_row()
        self._step = step
        self._row |= {name: _load(value) if isinstance(value, list) else value for name, value in values.items()}

    def _send_row(self) -> None:
        row, self._row = self._row, {}
        if self._run is None or not row:
            return
        self._held = self._step
        try:
            self._run.log(row, step=self._step, commit=True)
        except Exception as error:  # noqa: BLE001 - whatever W&B does, training goes on
            log.warning("W&B stopped taking reports (%s); everything is in the metrics file", error)
            self._run = None

    def _make_up(self, metrics: Path, iteration: int) -> None:
        """Report again what W&B has not, up to where the run goes on."""
        after, steps, self._step = self._held, set[int](), self._held
        try:
            if after < 0:  # it has nothing: from where it was on first
                first = first_with_wandb(metrics)
                after = iteration if first is None else first or -1
            for step, panels in replay(metrics, after, iteration) if after < iteration else ():
                self.log(panels, step)
                steps.add(step)
        except OSError as error:
            log.warning("W&B may lack steps of earlier starts: %s", error)
        self._send_row()
        self._step = iteration
        if steps:
            log.info("W&B had not all that earlier starts reported: the steps %d to %d again", min(steps), max(steps))

    def send(self, message: Message) -> None:
        """Alert by `message`. W&B's own process sends it, also when the network is back.

        Raises:
            Exception: whatever W&B does; a ConnectionError where there is no run.
        """
        if self._run is None:
            raise ConnectionError("there is no W&B run")
        levels = {"info": "INFO", "warning": "WARN", "error": "ERROR"}
        # Rates are limited before: W&B itself would drop what comes too soon.
        self._run.alert(message.title[:63], message.text, level=levels[message.severity], wait_duration=0.001)

    def flush(self) -> None:
        """W&B's own process has all but the last row, which may be half a row."""

    def close(self, *, failed: bool = False) -> None:
        """Finish the run, in a time that is limited."""
        if not failed:
            self._send_row()  # of a run that failed it may be half a row; when it goes on, it is reported again
        if self._run is None:
            return
        folder = Path(self._run.dir).parent
        finishing = threading.Thread(target=self._finish, args=(int(failed),), name="W&B finishes", daemon=True)
        finishing.start()
        finishing.join(_FINISH_SECONDS + _FINISH_MARGIN_SECONDS)
        if finishing.is_alive():
            log.warning("W&B does not finish; what it has not sent goes with: wandb sync --include-online %s", folder)
            _end_service()
            finishing.join(_FINISH_MARGIN_SECONDS)

    def _finish(self, exit_code: int) -> None:
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:  # noqa: BLE001 - whatever W&B does, training goes on
            log.warning("W&B could not finish: %s", error)


def _end_service() -> None:
    """End the process in which wandb works, which would keep this one from ending."""
    import psutil
    import wandb

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("wandb"):
                process.kill()
    with contextlib.suppress(Exception, SystemExit):  # it would exit with the code of what was killed
        wandb.teardown()  # what it does at the end of this process otherwise, with a traceback


def _load(shares: list[float]) -> Any:
    """A load over experts as W&B draws it over time: a heat map with one row an expert."""
    import numpy
    import wandb

    if len(shares) > wandb.Histogram.MAX_LENGTH:
        return None  # W&B draws no more; the metrics file has it
    return wandb.Histogram(np_histogram=(numpy.array(shares), numpy.arange(len(shares) + 1)))


def _folder(settings: WandbConfig, directory: Path) -> Path:
    """Where W&B keeps its files."""
    return Path(settings.directory) if settings.directory else directory


def _start(
    settings: WandbConfig,
    mode: Literal["online", "offline"],
    run_id: str,
    directory: Path,
    configuration: Mapping[str, Any],
) -> Any:
    import wandb  # slow to import, and not needed where it is off

    if mode == "online" and not wandb.login(prompt=False):
        raise RuntimeError("no credentials: set WANDB_API_KEY or run `wandb login`")
    where = _folder(settings, directory)
    where.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        name=settings.name or directory.name,
        group=settings.group,
        tags=settings.tags or None,
        id=run_id,
        resume="allow" if mode == "online" else None,
        mode=mode,
        dir=str(where),
        config=dict(configuration),
        settings=wandb.Settings(init_timeout=30, finish_timeout=_FINISH_SECONDS, console="off", silent=True),
    )
    run.define_metric(EVALUATED, hidden=True)
    run.define_metric(f"{EVALUATION}/*", step_metric=EVALUATED)
    return run
