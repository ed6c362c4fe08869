"""What asks a run to stop: all ranks finish the same step, save, and end with the exit code of the signal.

A time that has come (train.exit_at) counts as SIGALRM, which nobody sends.
"""

import contextlib
import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

EXIT_AT = signal.SIGALRM
"""Stands for train.exit_at: exit code 142."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopSignals:
    """While inside, SIGTERM, SIGUSR1, SIGHUP and Ctrl-C are noted and end nothing; a second Ctrl-C does.

    Only the main thread may enter. Signals that are ignored already (SIGHUP under nohup) stay ignored.

    Args:
        speaks: whether this process says so; one of a run does.
        ends_at: when to stop, in seconds since 1970; on one rank, whose clock counts for all.
    """

    def __init__(self, *, speaks: bool, ends_at: float | None = None) -> None:
        self._speaks, self._ends_at = speaks, ends_at
        self.number = 0
        """The first signal that came; 0 before one has."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # After a failure nothing is left to save: what comes now ends the process.
            signal.signal(number, handler)

    def is_noted(self) -> bool:
        """Whether a signal or the time to stop has come."""
        if self._ends_at is not None and time.time() >= self._ends_at:
            self.number = self.number or EXIT_AT
        return self.number != 0

    def agreed(self, asked: int, group: dist.ProcessGroup, device: torch.device) -> int:
        """The signal at which all ranks stop now, 0 for going on.

        Args:
            asked: how many ranks have noted one; the same on all of them.
        """
        if not asked:
            return 0
        number = torch.tensor(self.number, device=device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=group)
        return int(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            return
        self.number = number
        again = ""
        if number == signal.SIGINT:
            again = "; Ctrl-C again ends at once"
            # torchrun, ended by the second Ctrl-C, hands on SIGTERM.
            for once_more in (signal.SIGINT, signal.SIGTERM):
                signal.signal(once_more, signal.SIG_DFL)
        if self._speaks:
            # Not through logging, which may have been interrupted within a line; nor to a terminal that is gone.
            with contextlib.suppress(OSError):
                os.write(2, f"{signal.Signals(number).name}: finishing the step, then saving{again}\n".encode())


def stop_name(number: int) -> str:
    """What stopped a run, for people."""
    return "train.exit_at" if number == EXIT_AT else signal.Signals(number).name
