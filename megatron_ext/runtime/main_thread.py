"""What the main thread of a rank is at: whether it moves, or waits in a collective for other ranks, and where.

It is looked at from another thread, so that what it runs need not say anything.
"""

import linecache
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist

_COLLECTIVES = f"{Path(dist.__file__).parent}/"
_WAITS = re.compile(r"\.(wait|item|tolist|cpu|synchronize)\(\)$")
"""Calls into C that wait for a collective or for the device. What is written in Python has calls of its own inside."""
_AT_WORK = 0.05
"""Share of a core above which a thread moves, wherever its stack stands."""
_FIRST = 10
"""How many times as long a rank may stand still before its first step is done."""


@dataclass(frozen=True)
class Standing:
    """What a rank's main thread is at."""

    waiting: float
    """Seconds that it has been waiting for other ranks at one place; 0 if it is not."""
    still: float
    """Seconds since it came to another line or used its processor."""
    in_step: bool
    """Whether it is within a training step."""
    steps: int
    """Training steps that it has finished."""
    place: str
    """File, line and call."""


class MainThread:
    """Looks at the main thread of this process. `look` is to be called every second or so, by one other thread."""

    def __init__(self) -> None:
        self.in_step, self.steps = False, 0
        """Said by the training loop, as in `Standing`."""
        ident = threading.main_thread().ident
        assert ident is not None
        self._ident = ident
        self._stack: tuple[tuple[int, int], ...] = ()
        self._used = 0.0
        self._looked_at = self._came_at = self._moved_at = time.monotonic()

    def look(self) -> Standing:
        """What it is at now."""
        now, used = time.monotonic(), self._processor_time()
        frame = sys._current_frames().get(self._ident)
        stack = tuple(_stack(frame))
        if came := stack != self._stack:
            self._came_at = now
        if came or used - self._used > _AT_WORK * (now - self._looked_at):
            self._moved_at = now
        self._stack, self._used, self._looked_at = stack, used, now
        waits, place = _place(frame)
        waiting = now - self._came_at if waits else 0.0
        return Standing(waiting, now - self._moved_at, self.in_step, self.steps, place)

    def _processor_time(self) -> float:
        if not hasattr(time, "pthread_getcpuclockid"):
            return 0.0
        return time.clock_gettime(time.pthread_getcpuclockid(self._ident))


def late_rank(standings: Sequence[Standing], patience: float) -> int | None:
    """The one rank for which all others have been waiting for `patience` seconds; None where there is no such rank.

    Saving and validation may take a rank as long as they like while it moves; a training step may not. In the first one
    other processes compile, while nothing moves here.
    """
    late = [rank for rank, standing in enumerate(standings) if not standing.waiting]
    if len(late) != 1 or len(standings) == 1:
        return None
    [rank] = late
    if min(standing.waiting for other, standing in enumerate(standings) if other != rank) <= patience:
        return None
    slow = standings[rank]
    if not slow.steps:
        return rank if slow.still > _FIRST * patience else None
    return rank if slow.in_step or slow.still > patience else None


def _stack(frame: FrameType | None) -> Iterator[tuple[int, int]]:
    while frame is not None:
        yield id(frame.f_code), frame.f_lasti
        frame = frame.f_back


def _place(frame: FrameType | None) -> tuple[bool, str]:
    """Whether the innermost call of `frame` waits for other ranks, and where it stands."""
    if frame is None:
        return False, "no Python code"
    code, call = frame.f_code, _call(frame)
    waits = code.co_filename.startswith(_COLLECTIVES) or _WAITS.search(call) is not None
    return waits, f"{code.co_filename}, line {frame.f_lineno}, in {code.co_name}: {call}"


def _call(frame: FrameType) -> str:
    """The source of the call at which `frame` stands: its line, or the part of it."""
    line, last, start, end = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    number = line or frame.f_lineno
    if number is None:  # between two lines, such as where Python leaves a block
        return "no line of its source"
    text = linecache.getline(frame.f_code.co_filename, number)
    if start is None or line != last:
        return text.strip()
    return text.encode()[start:end].decode(errors="replace").strip()
