"""Copies the newest checkpoint of a run to its second place, on a thread of the first rank; training never waits."""

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.checkpoint.find import complete_checkpoints, iteration_of
from megatron_ext.checkpoint.retention import Retention
from megatron_ext.checkpoint.second_place import SecondPlace
from megatron_ext.errors import CheckpointError

log = logging.getLogger(__name__)

RETRY = 60.0
"""Seconds until a copy that failed is tried again."""
_SAYING = 60.0


@dataclass(frozen=True)
class Copied:
    """What became of one copy."""

    checkpoint: Path
    place: str
    seconds: float
    error: CheckpointError | None
    """Why it failed; it is tried again."""
    lag: int
    """Steps by which the second place is behind then."""


class Copier:
    """Copies whatever is newest, so that a slow place misses some but is never further behind than one copy takes.

    Args:
        directory: the run's.
        retention: what stays at the second place.
    """

    def __init__(self, directory: Path, place: SecondPlace, retention: Retention) -> None:
        self._directory, self._place, self._retention = directory, place, retention
        self._wake, self._end = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._copied: list[Copied] = []
        self._at: int | None = None
        """The newest step at the second place; None as long as that is unknown, -1 for none."""
        self._failure: CheckpointError | None = None
        self.in_use: Path | None = None
        """What is being read, and must stay."""
        self._thread = threading.Thread(target=self._work, name="checkpoint copier", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is a newer checkpoint."""
        self._wake.set()

    def lag(self) -> int:
        """Steps between the newest checkpoint and the newest copy."""
        newest = complete_checkpoints(self._directory)[-1:]
        return max(iteration_of(newest[0]) - max(self._at or 0, 0), 0) if newest else 0

    def copied(self) -> list[Copied]:
        """What was copied, or failed to be, since this was asked last."""
        with self._lock:
            copied, self._copied = self._copied, []
        return copied

    def finish(self) -> None:
        """Wait until the newest checkpoint is copied, then end; CheckpointError where that fails."""
        begun = said = time.monotonic()
        self._failure = None
        self._wake.set()  # also what has failed before
        while not self.is_level() and self._failure is None:
            time.sleep(0.05)
            if time.monotonic() - said > _SAYING:
                said = time.monotonic()
                log.info("copying the newest checkpoint to %s for %.0f s", self._place.url, said - begun)
        self.close()
        if self._failure is not None:
            raise self._failure

    def is_level(self) -> bool:
        """Whether the newest checkpoint is at the second place."""
        newest = complete_checkpoints(self._directory)[-1:]
        return not newest or (self._at is not None and self._at >= iteration_of(newest[0]))

    def close(self) -> None:
        """End the thread; a copy that is on its way is left unfinished."""
        self._end.set()
        self._wake.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._end.is_set():
            self._wake.clear()
            newest = complete_checkpoints(self._directory)[-1:]
            failed = bool(newest) and not self._copy(newest[0])
            # What has become newer in the meantime comes first.
            if not self._end.is_set() and (failed or self.is_level()):
                self._wake.wait(RETRY if failed else None)

    def _copy(self, newest: Path) -> bool:
        """Have `newest` at the second place; whether it is."""
        begun, error = time.monotonic(), None
        self.in_use = newest
        try:
            names = self._place.complete()
            if names:
                self._place.require_run(names[-1], self._directory)
            at = [int(name[5:]) for name in names]
            self._at = max(at, default=-1)
            if iteration_of(newest) in at:
                self._failure = None
                return True
            if not self._place.send(newest, lambda: not self._end.is_set()):
                return False
            self._at = max(self._at, iteration_of(newest))
            for old in self._retention.superseded([Path(name) for name in self._place.complete()]):
                self._place.remove(old.name)
        except CheckpointError as fault:
            error = fault
        except OSError as fault:
            error = CheckpointError(str(fault))
        finally:
            self.in_use = None
        self._failure = error
        with self._lock:
            self._copied.append(Copied(newest, self._place.url, time.monotonic() - begun, error, self.lag()))
        return error is None
