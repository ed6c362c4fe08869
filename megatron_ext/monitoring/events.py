"""What happens to a run besides its steps, for its records and for those who are told of it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["info", "warning", "error"]

STARTED = "started"
EVALUATION = "evaluation"
"""The results of a checkpoint's evaluation, at the step of the checkpoint."""
GRADIENTS = "gradients"
"""Statistics of the gradients by place and group of weights."""

_SEVERITIES: dict[str, Severity] = {
    "failed": "error",
    "guard_stop": "error",
    "stall": "error",
    "lost_rank": "error",
    "nonfinite": "warning",
    "spike": "warning",
    "skip": "warning",
    "rollback": "warning",
    "slow_rank": "warning",
    "disk": "warning",
    "checkpoint_failed": "warning",
    "evaluation_failed": "warning",
}


@dataclass(frozen=True)
class Event:
    """Something that happened to a run."""

    kind: str
    """One word for the records, such as skip."""
    iteration: int
    """Steps done when it happened."""
    text: str
    """One line for people."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """More for the records: values of JSON by name."""
    at: float = field(default_factory=time.time, compare=False, repr=False)
    """When, in seconds since 1970."""

    @property
    def severity(self) -> Severity:
        """error: the run ends with it; warning: somebody should look; info: as planned."""
        return _SEVERITIES.get(self.kind, "info")

    @property
    def panels(self) -> dict[str, float]:
        """Numbers that are drawn over the steps of the run, by the name of their panel."""
        return event_panels(self.kind, self.details)

    def record(self) -> dict[str, Any]:
        """The line of the metrics file."""
        # The start of a run is called so since the first metrics files.
        kind = "start" if self.kind == STARTED else self.kind
        return {"event": kind, "iteration": self.iteration, "text": self.text, **self.details}


def event_panels(kind: str, details: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an event that are drawn, by panel; its `details` also as the metrics file has them."""
    if kind == EVALUATION:
        return {f"{EVALUATION}/{name}": value for name, value in details.get("results", {}).items()}
    if kind == GRADIENTS:
        return {
            f"{GRADIENTS}/{name}/{place}/{group}": value
            for place, groups in details.get(GRADIENTS, {}).items()
            for group, statistics in groups.items()
            for name, value in statistics.items()
        }
    return {}


Tell = Callable[[Event], None]
"""Takes what happened; may be called on every rank, of which rank 0's counts."""
