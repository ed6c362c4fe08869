"""What happens to a run besides its steps, for its records and for those who are told of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


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

    def record(self) -> dict[str, Any]:
        """The line of the metrics file."""
        return {"event": self.kind, "iteration": self.iteration, "text": self.text, **self.details}


Tell = Callable[[Event], None]
"""Takes what happened; may be called on every rank, of which rank 0's counts."""
