"""Notices that a training no longer moves, by the pace of its own steps, and writes the stacks of this process."""

import contextlib
import faulthandler
import statistics
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.config import WatchdogConfig
from megatron_ext.runtime.main_thread import Standing

STALLS = "stalls"
"""Folder of a checkpoint directory with the stacks of runs that did not move."""
_LEARNS_FROM = 32
"""Steps over which the pace is taken."""
_FIRST_STEPS = 3
"""Steps that compile, and say nothing of the pace."""
_LONGEST_LOOK = 5.0
"""A process that was not looked at for longer was stopped itself: that is no time in which it could have moved."""


class Watchdog:
    """Knows how long a step may take. `step` is for the main thread, `overdue` for one that looks on."""

    def __init__(self, limits: WatchdogConfig) -> None:
        self._limits = limits
        self._paces: deque[float] = deque(maxlen=_LEARNS_FROM)
        self._steps, self._in_step = 0, False
        self._looked_at = self._finished_at = time.monotonic()
        self._elapsed = 0.0
        """Seconds since something was finished."""

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A training step is inside."""
        begun = self._finished_at = time.monotonic()
        self._elapsed, self._in_step = 0.0, True
        try:
            yield
            self._steps += 1
            if self._steps > _FIRST_STEPS:
                self._paces.append(time.monotonic() - begun)
        finally:
            self._finished_at = time.monotonic()
            self._elapsed, self._in_step = 0.0, False

    def limit(self) -> float:
        """Seconds that what this process is at now may take."""
        limits, paces = self._limits, list(self._paces)
        if not self._in_step or not paces:
            return 60 * limits.first_step_minutes
        return max(60 * limits.minimum_minutes, limits.factor * statistics.median(paces))

    def overdue(self, standing: Standing) -> str | None:
        """Why the run is to be ended; None while it moves. To be asked every second or so.

        Within a step nothing counts but its end; outside, whatever moves counts: a validation, a save.
        """
        if not self._limits.enabled:
            return None
        now = time.monotonic()
        # Of the time since the last look what came before the last end is none of the present step's.
        self._elapsed += min(now - max(self._looked_at, self._finished_at), _LONGEST_LOOK)
        self._looked_at = now
        if not self._in_step:
            self._elapsed = min(self._elapsed, standing.still)
        limit = self.limit()
        if self._elapsed <= limit:
            return None
        if not self._in_step:
            return f"nothing has moved for {limit:.0f} s outside of a step (runtime.watchdog.first_step_minutes)"
        paces = list(self._paces)
        pace = f"the last ones took {statistics.median(paces):.3g} s" if paces else "one of the first of this process"
        return f"step {self._steps + 1} of this job has not ended within {limit:.0f} s ({pace}; runtime.watchdog)"


def write_stack(folder: Path, rank: int, header: str) -> None:
    """Write where every thread of this process stands to `rank_N.txt` in `folder`, with `header` above."""
    with contextlib.suppress(OSError):  # a full disk is no reason to wait for ever
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"rank_{rank}.txt", "w", encoding="utf-8") as file:
            file.write(f"{header}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
