"""What the time of a step goes to: moments are noted between its parts, and read when a report is due."""

import time
from typing import Any

import torch

_MOST_NOTED = 4096


class StepTimes:
    """The time between two marks is that of the part which the second one names; together they are all the time.

    On CUDA a mark is an event in the stream that the device works off: it costs microseconds, and only reading waits
    for the device. So a part is the time in which the device worked for it, or waited for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._spare: list[Any] = []
        """Events that were read and may be used again."""
        self._seconds: dict[str, float] = {}
        self._noted: list[tuple[str, Any]] = []
        self._last = self._moment()

    def mark(self, part: str) -> None:
        """What happened since the last mark was `part`."""
        if len(self._noted) >= _MOST_NOTED:
            self._add_up()
        self._noted.append((part, self._moment()))

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last call."""
        self._add_up()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _moment(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add_up(self) -> None:
        if self._on_cuda and self._noted:
            self._noted[-1][1].synchronize()
        for part, moment in self._noted:
            took = self._last.elapsed_time(moment) / 1e3 if self._on_cuda else moment - self._last
            self._seconds[part] = self._seconds.get(part, 0.0) + took
            if self._on_cuda:
                self._spare.append(self._last)
            self._last = moment
        self._noted.clear()
