"""How long this rank needs for its own part of a step: until its gradients wait for those of the other ranks.

In that time it waits for nobody but the ranks that it shares layers with (TP, PP, EP): of those that wait for each
other at the end of every step it tells who is late.
"""

import statistics
import time
from collections import deque

import torch

_MOST = 256
"""Steps that are remembered between two looks."""


class Pace:
    """Marks both ends of each step; on a GPU by events on its stream, so that nobody waits for it."""

    def __init__(self) -> None:
        self._begun: float | torch.cuda.Event | None = None
        self._on_gpu = False
        self._spans: deque[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = deque(maxlen=_MOST)

    def begin(self, device: torch.device) -> None:
        """A step begins."""
        self._on_gpu = device.type == "cuda"
        self._begun = self._mark()

    def gradients_ready(self) -> None:
        """This rank's gradients are there; what follows waits for the others."""
        if self._begun is not None:
            self._spans.append((self._begun, self._mark()))
            self._begun = None

    def seconds(self) -> float:
        """The median since this was asked last; 0 where there was no step."""
        spans = [_between(begun, ready) for begun, ready in self._spans]
        self._spans.clear()
        return statistics.median(spans) if spans else 0.0

    def _mark(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(begun: float | torch.cuda.Event, ready: float | torch.cuda.Event) -> float:
    if isinstance(begun, torch.cuda.Event) and isinstance(ready, torch.cuda.Event):
        ready.synchronize()
        return float(begun.elapsed_time(ready)) / 1000
    assert isinstance(begun, float)
    assert isinstance(ready, float)
    return ready - begun
