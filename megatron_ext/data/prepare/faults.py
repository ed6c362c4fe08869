"""What is done about a line that cannot be read: it ends the command, or is counted and left out."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_ext.errors import DataError

_KEPT = 10
"""Faults of a shard whose place is said: finding the number of a line means reading all before it."""


SKIPPING = "; --bad-lines skip leaves such documents out and counts them"
GOING_ON = f"{SKIPPING}, and goes on from what is done"
_SAID = 3
"""Faults whose place is said when all is done."""


class BadDocument(Exception):
    """A document that cannot be read; `why` says it in words."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


@dataclass
class Faults:
    """The faults met while reading.

    Attributes:
        are_fatal: the first one ends the reading.
        advice: what else can be done, for the message of that one.
        count: all that were met.
        messages: file, line and reason of the first of them.
    """

    are_fatal: bool = True
    advice: str = ""
    count: int = 0
    messages: list[str] = field(default_factory=list)

    def meet(self, where: Callable[[], str], why: str) -> None:
        """Count a fault.

        Raises:
            DataError: faults are fatal.
        """
        if self.are_fatal:
            raise DataError(f"{where()}: {why}{self.advice}")
        self.count += 1
        if len(self.messages) < _KEPT:
            self.messages.append(f"{where()}: {why}")


def say_left_out(left_out: Mapping[str, int], messages: Sequence[str]) -> None:
    """Say how many documents were left out for which reason, and where the first lines are that could not be read."""
    counts = {reason: count for reason, count in left_out.items() if count}
    if counts:
        total = sum(counts.values())
        print(f"{total:,} left out: {', '.join(f'{n:,} {reason}' for reason, n in counts.items())}", file=sys.stderr)
    for line in messages[:_SAID]:
        print(f"  {line}", file=sys.stderr)
