"""What a sink is given of a run."""

from typing import Protocol

from megatron_ext.monitoring.events import Event
from megatron_ext.monitoring.sources import ValidationReport
from megatron_ext.monitoring.step_report import StepRecord


class Sink(Protocol):
    """Takes the reports of a run, on rank 0, in the order in which things happen.

    None of its methods raises or waits because what it writes to does not answer: training goes on without it.
    """

    def step(self, record: StepRecord) -> None:
        """A report of training."""

    def validation(self, iteration: int, report: ValidationReport) -> None:
        """A validation after `iteration` steps."""

    def event(self, event: Event) -> None:
        """Something else that happened; the first one is that the run has started. From any thread."""

    def flush(self) -> None:
        """The process may end now: have what it was told of leave it, if that takes seconds."""

    def close(self, *, failed: bool) -> None:
        """The run is over; with `failed`, not as it should be."""
