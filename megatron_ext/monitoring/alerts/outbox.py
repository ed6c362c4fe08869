"""A thread that brings messages to one place, again and again until they are there; training never waits for it."""

import logging
import threading
import time
from collections import deque
from typing import Protocol

from megatron_ext.monitoring.alerts.message import Message, RunNames, message_of
from megatron_ext.monitoring.alerts.rate_limit import RateLimit
from megatron_ext.monitoring.events import Event

log = logging.getLogger(__name__)

MOST_WAITING = 1000
"""Messages that wait for a place that does not answer; of more, only how many is told."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 300.0


class Refused(Exception):
    """The place does not take this message, and never will."""


class Channel(Protocol):
    """A place that messages are sent to."""

    @property
    def name(self) -> str:
        """For warnings."""

    def send(self, message: Message) -> None:
        """Send `message`.

        Raises:
            Refused: this one is not taken; the next may be.
            Exception: it did not work, and may later. Its text holds no secret.
        """


class Outbox:
    """Sends events to `channel` from a thread of its own, in their order.

    Args:
        repeat_seconds: of one kind of event, one message at most in this time.
    """

    def __init__(self, channel: Channel, names: RunNames, repeat_seconds: float) -> None:
        self._channel, self._names = channel, names
        self._limit = RateLimit(repeat_seconds)
        self._waiting: deque[tuple[Event, int]] = deque()
        """Events to tell of, each with how many of its kind were held back before it."""
        self._too_many = 0
        self._is_failing = False
        self._pause, self._retry_at = _FIRST_PAUSE, 0.0
        self._sending: list[tuple[Event, int]] = []
        """The one that is on its way."""
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"alerts to {channel.name}", daemon=True)
        self._thread.start()

    def put(self, event: Event) -> None:
        """Take `event`, to be told of as soon as may be."""
        with self._changed:
            if self._limit.admit(event, time.monotonic()):
                self._append(event, 0)
            self._changed.notify_all()

    def flush(self, seconds: float) -> None:
        """Wait until everything that may be sent is, at most so many seconds."""
        with self._changed:
            self._retry_at, self._pause = 0.0, _FIRST_PAUSE
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting and not self._sending, seconds)

    def close(self, seconds: float) -> list[Event]:
        """Send what is left, also what was held back, in at most so many seconds; return what could not be sent."""
        with self._changed:
            for event, before in self._limit.rest():
                self._append(event, before)
        self.flush(seconds)
        with self._changed:
            self._is_closed = True
            left = [*self._sending, *self._waiting]
            self._changed.notify_all()
        if lost := sum(1 + before for _, before in left) + self._too_many:
            log.warning("%d alerts did not reach %s; they are in the metrics file", lost, self._channel.name)
        return [event for event, _ in left]

    def _append(self, event: Event, before: int) -> None:
        if len(self._waiting) >= MOST_WAITING:
            self._too_many += 1 + before
        else:
            self._waiting.append((event, before))

    def _work(self) -> None:
        while (item := self._next()) is not None:
            event, before = item
            try:
                self._channel.send(message_of(event, self._names, before))
            except Refused as error:
                log.warning("%s does not take an alert of kind %s: %s", self._channel.name, event.kind, error)
            except Exception as error:  # noqa: BLE001 - whatever the place does, training goes on
                self._fail(item, error)
                continue
            self._succeed()

    def _next(self) -> tuple[Event, int] | None:
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

    def _fail(self, item: tuple[Event, int], error: Exception) -> None:
        """Put `item` back, to be tried again after a pause that doubles; warn once."""
        with self._changed:
            self._sending = []
            self._waiting.appendleft(item)
            if not self._is_failing:
                log.warning("alerts do not reach %s, which is tried again: %s", self._channel.name, error)
            self._is_failing = True
            self._retry_at = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
