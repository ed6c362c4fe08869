"""A thread that brings messages to one place, again and again until they are there; training never waits for it."""

import logging
import threading
import time
from collections import deque
from typing import Protocol

from megatron_ext.monitoring.alerts.message import Message, RunNames, message_of
from megatron_ext.monitoring.alerts.rate_limit import RateLimit
from megatron_ext.monitoring.alerts.spool import Alert, Spool
from megatron_ext.monitoring.events import Event

log = logging.getLogger(__name__)

MOST_WAITING = 1000
"""Messages that wait for a place that does not answer; of more, the last of each kind, with how many came before it."""
_WRITING = 5.0
"""Seconds that the end waits for the file of what is not sent."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 300.0


class Refused(Exception):
    """The place does not take this message, and never will."""


class Channel(Protocol):
    """A place that messages are sent to."""

    @property
    def name(self) -> str:
        """For warnings."""

    @property
    def key(self) -> str:
        """A short name, as part of that of a file."""

    def send(self, message: Message) -> None:
        """Send `message`.

        Raises:
            Refused: this one is not taken; the next may be.
            Exception: it did not work, and may later. Its text holds no secret.
        """


class Outbox:
    """Sends events to `channel` from a thread of its own, in their order; first what the run has not sent before.

    Args:
        repeat_seconds: of one kind of event, one message at most in this time.
        spool: keeps what is not sent.
    """

    def __init__(self, channel: Channel, names: RunNames, repeat_seconds: float, spool: Spool) -> None:
        self._channel, self._names, self._spool = channel, names, spool
        self._limit = RateLimit(repeat_seconds)
        self._waiting: deque[Alert] = deque(spool.adopt())
        self._is_failing = False
        self._pause, self._retry_at = _FIRST_PAUSE, 0.0
        self._sending: list[Alert] = []
        """The one that is on its way."""
        self._is_closed = False
        self._changed = threading.Condition()
        spool.start(self._unsent)
        if self._waiting:
            spool.changed()
        self._thread = threading.Thread(target=self._work, name=f"alerts to {channel.name}", daemon=True)
        self._thread.start()

    def put(self, event: Event) -> None:
        """Take `event`, to be told of as soon as may be."""
        with self._changed:
            if self._limit.admit(event, time.monotonic()):
                self._append(event, 0)
            self._changed.notify_all()
        self._spool.changed()

    def flush(self, seconds: float) -> None:
        """Wait until everything that may be sent is, at most so many seconds."""
        with self._changed:
            self._retry_at, self._pause = 0.0, _FIRST_PAUSE
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting and not self._sending, seconds)

    def close(self, seconds: float) -> None:
        """Send what is left, also what was held back, in at most so many seconds; say what could not be sent."""
        with self._changed:
            for event, before in self._limit.rest():
                self._append(event, before)
        self.flush(seconds)
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        is_kept, left = self._spool.close(_WRITING), self._unsent()
        if lost := sum(1 + alert.before for alert in left):
            then = f"kept in {self._spool.path}, and sent at the next start" if is_kept else "in the metrics file"
            log.warning("%d alerts did not reach %s; they are %s", lost, self._channel.name, then)

    def _unsent(self) -> list[Alert]:
        """All that people are still to be told of."""
        with self._changed:
            return [*self._sending, *self._waiting, *(Alert(*held) for held in self._limit.held())]

    def _append(self, event: Event, before: int) -> None:
        """Have it wait; where too many do, in the stead of the last one of its kind."""
        if len(self._sending) + len(self._waiting) >= MOST_WAITING:
            for place in range(len(self._waiting) - 1, -1, -1):
                if self._waiting[place].event.kind == event.kind:
                    self._waiting[place] = Alert(event, self._waiting[place].before + 1 + before)
                    return
        self._waiting.append(Alert(event, before))

    def _work(self) -> None:
        while (alert := self._next()) is not None:
            try:
                self._channel.send(message_of(alert, self._names))
            except Refused as error:
                log.warning("%s does not take an alert of kind %s: %s", self._channel.name, alert.event.kind, error)
            except Exception as error:  # noqa: BLE001 - whatever the place does, training goes on
                self._fail(alert, error)
                continue
            self._succeed()

    def _next(self) -> Alert | None:
        """The next event to tell of, as soon as it may be tried; None at the end."""
        with self._changed:
            while not self._is_closed:
                now = time.monotonic()
                for event, before in self._limit.due(now):
                    self._append(event, before)
                if self._waiting and now >= self._retry_at:
                    self._sending = [self._waiting.popleft()]
                    return self._sending[0]
                times = [self._retry_at if self._waiting else None, self._limit.next_due()]
                wake_at = min((at for at in times if at is not None), default=None)
                self._changed.wait(None if wake_at is None else max(wake_at - now, 0.0))
            return None

    def _succeed(self) -> None:
        with self._changed:
            if self._is_failing:
                log.info("alerts reach %s again", self._channel.name)
            self._sending, self._is_failing, self._pause = [], False, _FIRST_PAUSE
            self._changed.notify_all()
        self._spool.changed()

    def _fail(self, alert: Alert, error: Exception) -> None:
        """Put `alert` back, to be tried again after a pause that doubles; warn once."""
        with self._changed:
            self._sending = []
            self._waiting.appendleft(alert)
            if not self._is_failing:
                log.warning("alerts do not reach %s, which is tried again: %s", self._channel.name, error)
            self._is_failing = True
            self._retry_at = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
