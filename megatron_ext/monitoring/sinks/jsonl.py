"""The metrics file as a sink: everything, one JSON object a line."""

import time
from pathlib import Path

from megatron_ext.monitoring.events import Event
from megatron_ext.monitoring.metrics_file import MetricsFile
from megatron_ext.monitoring.sources import ValidationReport, validation_record
from megatron_ext.monitoring.step_report import StepRecord


class JsonlSink:
    """Goes on with the file at `path` where `iteration` steps are done."""

    def __init__(self, path: Path, iteration: int) -> None:
        self._file = MetricsFile(path, iteration)

    def step(self, record: StepRecord) -> None:
        """The report as it is."""
        self._file.write(record.values)

    def validation(self, iteration: int, report: ValidationReport) -> None:
        """Loss, in all and by source."""
        self._file.write({**validation_record(iteration, report), "time": time.time()})

    def event(self, event: Event) -> None:
        """The event with its details."""
        self._file.write({**event.record(), "time": time.time()})

    def flush(self) -> None:
        """Nothing waits."""

    def close(self, *, failed: bool) -> None:
        """Close the file."""
        self._file.close()
