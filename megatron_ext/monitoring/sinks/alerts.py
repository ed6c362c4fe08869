"""Alerts as a sink: hands the events that people want to be told of to each place they are sent to."""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ext.config import AlertsConfig
from megatron_ext.monitoring.alerts.mail import Mail
from megatron_ext.monitoring.alerts.message import RunNames
from megatron_ext.monitoring.alerts.outbox import Channel, Outbox
from megatron_ext.monitoring.alerts.spool import Spool
from megatron_ext.monitoring.alerts.webhook import Webhook
from megatron_ext.monitoring.events import Event
from megatron_ext.monitoring.metrics_file import METRICS_FILE
from megatron_ext.monitoring.sources import ValidationReport
from megatron_ext.monitoring.step_report import StepRecord

FLUSH_SECONDS = 20.0
"""What the end of a run waits at most for alerts that are not sent yet."""


class AlertsSink:
    """Tells of the events that `settings` name.

    Args:
        directory: of the run's checkpoints, by which messages name it.
        records: the metrics file; what is not sent is kept beside it, under a name that no other run has there.
        others: places beside those of `settings`.
        is_runs: whether this process is the run, and not one that failed before it was.
    """

    def __init__(
        self,
        settings: AlertsConfig,
        directory: Path,
        records: Path,
        others: Sequence[Channel] = (),
        *,
        is_runs: bool = True,
    ) -> None:
        self._kinds = frozenset[str](settings.events)
        names = _names(directory)
        self._outboxes = [
            Outbox(one, names, settings.repeat_seconds, Spool(records.parent, name, names.place, is_runs=is_runs))
            for one, name in ((one, _own(records, one.key)) for one in (*_channels(settings), *others))
        ]

    def step(self, record: StepRecord) -> None:
        """Nothing: a step is no event."""

    def validation(self, iteration: int, report: ValidationReport) -> None:
        """Nothing."""

    def event(self, event: Event) -> None:
        """Hand it on; returns at once."""
        for outbox in self._outboxes if event.kind in self._kinds else ():
            outbox.put(event)

    def flush(self) -> None:
        """Wait a little for what is not sent yet."""
        for outbox, seconds in self._within(FLUSH_SECONDS):
            outbox.flush(seconds)

    def close(self, *, failed: bool) -> None:
        """As `flush`, with what was held back; the rest is kept."""
        for outbox, seconds in self._within(FLUSH_SECONDS):
            outbox.close(seconds)

    def _within(self, seconds: float) -> Iterator[tuple[Outbox, float]]:
        """Each outbox with the seconds that are left for it, of `seconds` for all."""
        deadline = time.monotonic() + seconds
        for outbox in self._outboxes:
            yield outbox, max(deadline - time.monotonic(), 0.1)


def _channels(settings: AlertsConfig) -> list[Channel]:
    """The places of `settings` whose secrets are there; the startup checks have spoken of the others."""
    channels: list[Channel] = []
    if settings.webhook is not None and (url := os.environ.get(settings.webhook.url_variable)):
        channels.append(Webhook(url))
    if settings.email is not None:
        password = os.environ.get(settings.email.password_variable or "")
        channels.append(Mail(settings.email, password))
    return channels


def _own(records: Path, place: str) -> str:
    """`place` as the name of its file: the metrics files of several runs may lie in one folder."""
    return place if records.name == METRICS_FILE else f"{records.stem}.{place}"


def _names(directory: Path) -> RunNames:
    job = os.environ.get("SLURM_JOB_ID")
    slurm = f", Slurm job {job}" if job else ""
    place = directory.absolute()
    return RunNames(place.name, f"{place} on {socket.gethostname()}{slurm}")
