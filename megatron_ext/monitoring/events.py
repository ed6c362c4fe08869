"""What happens to a run besides its steps, for its records and for those who are told of it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["info", "warning", "error"]

STARTED = "started"
EVALUATION = "evaluation"
"""The results of a checkpoint's evaluation, at the step of the checkpoint."""

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
    panels: Mapping[str, float] = field(default_factory=dict)
    """Numbers that are drawn over the steps of the run, by the name of their panel."""
    at: float = field(default_factory=time.time, compare=False, repr=False)
    """When, in seconds since 1970."""

    @property
    def severity(self) -> Severity:
        """error: the run ends with it; warning: somebody should look; info: as planned."""
        return _SEVERITIES.get(self.kind, "info")

    def record(self) -> dict[str, Any]:
        """The line of the metrics file."""
        # The start of a run is called so since the first metrics files.
        kind = "start" if self.kind == STARTED else self.kind
        return {"event": kind, "iteration": self.iteration, "text": self.text, **self.details}


Tell = Callable[[Event], None]
"""Takes what happened; may be called on every rank, of which rank 0's counts."""
