"""The clock that throughput goes by: it stands still while a run validates and saves."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Seconds, without those in which it was stopped."""

    def __init__(self) -> None:
        self._stopped = 0.0

    def now(self) -> float:
        """Seconds since some moment."""
        return time.perf_counter() - self._stopped

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Leave out what happens inside."""
        begun = time.perf_counter()
        yield
        self._stopped += time.perf_counter() - begun
