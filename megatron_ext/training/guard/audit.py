"""What a run did besides plain steps, from its first one on: kept in every checkpoint, printed by tools/history.py."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

AUDIT_KEY = "audit"
"""Where `state.json` has it."""
MOST = 2000
"""Entries that are kept; the oldest go first, but for the very first one."""


class AuditLog:
    """A list of entries, each with its kind, the steps done when it happened, a line for people, and the time."""

    def __init__(self) -> None:
        self._entries: list[dict[str, Any]] = []

    def add(self, kind: str, step: int, text: str, details: Mapping[str, Any] | None = None) -> None:
        """Note what happened after `step` steps; `details` are values of JSON."""
        values = {name: _storable(value) for name, value in (details or {}).items()}
        self._entries.append({"kind": kind, "step": step, "text": text, "time": round(time.time(), 3), **values})
        if len(self._entries) > MOST:
            del self._entries[1]

    def entries(self) -> list[dict[str, Any]]:
        """All of them, oldest first."""
        return list(self._entries)

    def restore(self, entries: Any) -> None:
        """Go on from what `entries` returned.

        Raises:
            ValueError: it is no such list.
        """
        self._entries = check_entries(entries)


def _storable(value: Any) -> Any:
    """A number that is not finite as a word, which JSON has not."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def check_entries(entries: Any) -> list[dict[str, Any]]:
    """`entries`, which a file says; ValueError where they are no audit log."""
    is_log = isinstance(entries, Sequence) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("kind"), str)
        and type(entry.get("step")) is int
        and isinstance(entry.get("text"), str)
        and isinstance(entry.get("time"), int | float)
        for entry in entries
    )
    if not is_log:
        raise ValueError(f"{AUDIT_KEY} is no list of entries with kind, step, text and time")
    return list(entries)
