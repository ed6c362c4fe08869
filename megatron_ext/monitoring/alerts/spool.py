"""Alerts that wait to be sent, in a file beside the run's records: neither a kill nor the end of a run loses one."""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.files import write_text
from megatron_ext.monitoring.events import Event

log = logging.getLogger(__name__)

_FILE = "unsent_alerts"


@dataclass(frozen=True)
class Alert:
    """An event to tell of."""

    event: Event
    before: int = 0
    """How many of its kind were held back before it."""
    place: str | None = None
    """Where the process ran that was to tell of it; None: it is this one."""


class Spool:
    """What one place has not been told yet. A thread of its own writes it: nobody waits for a file system.

    Args:
        folder: beside the run's records.
        name: of the place, as part of a file's name.
        place: where this process runs, for whoever sends what it leaves.
        is_runs: whether this process is the run. One that failed before it was leaves its alerts to the next that is,
            and takes none: another process may be the run now.
    """

    def __init__(self, folder: Path, name: str, place: str, *, is_runs: bool = True) -> None:
        self._place, self._is_runs = place, is_runs
        own = name if is_runs else f"{name}.{socket.gethostname()}.{time.time_ns()}"
        self.path, self._all = folder / f"{_FILE}.{own}.json", f"{_FILE}.{name}.*json"
        self._adopted: list[Path] = []
        self._waiting: Callable[[], Sequence[Alert]] = list
        self._dirty, self._end = threading.Event(), threading.Event()
        self._is_written = True
        self._thread = threading.Thread(target=self._work, name=f"alerts kept for {name}", daemon=True)

    def adopt(self) -> list[Alert]:
        """What earlier processes of the run have left, oldest first; their files go once that of this one is there."""
        left: list[Alert] = []
        for path in self.path.parent.glob(self._all) if self._is_runs else ():
            try:
                left += [_from_json(entry) for entry in json.loads(path.read_bytes())]
                self._adopted.append(path)
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                said = "%s: its alerts cannot be read (%s) and are not sent; they are kept in %s"
                log.warning(said, path, error, _set_aside(path))
        return sorted(left, key=lambda alert: alert.event.at)

    def start(self, waiting: Callable[[], Sequence[Alert]]) -> None:
        """Keep what `waiting` returns, whenever it has changed."""
        self._waiting = waiting
        self._thread.start()

    def changed(self) -> None:
        """What waits is not what it was."""
        self._dirty.set()

    def close(self, seconds: float) -> bool:
        """Write what is left, in at most so many seconds; return whether the file has it."""
        self._end.set()
        self._dirty.set()
        self._thread.join(seconds)
        return self._is_written and not self._thread.is_alive()

    def _work(self) -> None:
        is_over = False
        while not is_over:
            self._dirty.wait()
            self._dirty.clear()
            is_over = self._end.is_set()
            self._write([self._to_json(alert) for alert in self._waiting()])

    def _write(self, entries: Sequence[Mapping[str, Any]]) -> None:
        try:
            if entries:
                write_text(self.path, json.dumps(entries, indent=1) + "\n")
            for path in (*self._adopted, self.path):
                if path != self.path or not entries:
                    path.unlink(missing_ok=True)
            self._is_written = True
        except OSError as error:
            if self._is_written:
                log.warning("%s: alerts that are not sent are not kept: %s", self.path, error.strerror)
            self._is_written = False

    def _to_json(self, alert: Alert) -> dict[str, Any]:
        event = alert.event
        told = {"kind": event.kind, "iteration": event.iteration, "text": event.text, "at": event.at}
        return {**told, "before": alert.before, "place": alert.place or self._place}


def _set_aside(path: Path) -> Path:
    """Give a file that cannot be read a name under which nothing is written, and no later start looks for it."""
    kept = path.with_name(f"{path.name}.unreadable-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}")
    try:
        path.rename(kept)
    except OSError:
        return path  # in a folder in which nothing can be written either
    return kept


def _from_json(entry: Mapping[str, Any]) -> Alert:
    event = Event(str(entry["kind"]), int(entry["iteration"]), str(entry["text"]), at=float(entry["at"]))
    return Alert(event, int(entry["before"]), str(entry["place"]))
