"""Notices within a minute that a rank has died, stopped or hangs, and ends all: a thread that listens to the hearts.

A dead rank of this host is found by its process, one elsewhere or a stopped one by the silence of its heart. Each rank
listens to the next one and writes down whom it misses, which all others read. A rank that lives, but for which all
others wait, is named by rank 0 and not ended: it may come. Where it does not come, the watchdog of one rank or another
ends all of them, with every rank's stack in a file.
"""

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from megatron_ext.config import WatchdogConfig
from megatron_ext.errors import MegatronExtError
from megatron_ext.launcher import launched_rank, launched_world_size
from megatron_ext.locks import release_all
from megatron_ext.runtime.hearts import Hearts
from megatron_ext.runtime.last_words import OWN_END, TELLING, LastWords, Told, at_most, tell_nobody
from megatron_ext.runtime.main_thread import MainThread, Standing
from megatron_ext.runtime.standings import FILES, Standings
from megatron_ext.runtime.watchdog import Watchdog

BEAT = 4.0
"""Seconds between heartbeats."""
SILENCE = 40.0
"""Seconds without a heartbeat after which a rank is missed."""
STARTING = 3
"""How many times as long a rank of another host may be silent until the ranks have met. Loading a library holds up all
threads of Python, and long where many ranks read one cold disk. Of one of this host is seen whether it was stopped."""
_SILENT_BEATS = 3
"""Heartbeats of a rank that are missed in a row, once a collective has failed, before it is called lost."""
_LOOK = 1.0


class Liveness:
    """Watches the other ranks while inside. Every rank must enter and leave it together, except after a failure.

    Where a rank is missed or nothing moves, all end with exit code 2 and one of them says why; collectives that wait
    for the missing one cannot be left otherwise. It may be entered once the ranks have answered a roll call, before
    they have a process group: until `met`, only missing ranks end the run.

    Args:
        directory: below which stacks are written.
        told: of what ends the run so.
        way_out: what to do then; the end of the message.
    """

    def __init__(
        self,
        limits: WatchdogConfig | None = None,
        directory: Path | None = None,
        told: Told = tell_nobody,
        way_out: str = "",
    ) -> None:
        self._watchdog = Watchdog(limits or WatchdogConfig(enabled=False))
        self._watches = limits is not None and limits.enabled
        self._has_met = dist.is_initialized()
        place = (dist.get_rank(), dist.get_world_size()) if self._has_met else (launched_rank(), launched_world_size())
        self._hearts = Hearts(*place)
        self._words = LastWords(self._hearts, way_out, told)
        self._standings = Standings(self._hearts, self._words, directory or Path())
        self._end = threading.Event()
        self._once = threading.Lock()
        self._thread: threading.Thread | None = None
        self._main = MainThread()
        self._silence = SILENCE
        self._looked_into: RuntimeError | None = None

    def __enter__(self) -> "Liveness":
        self._hearts.connect()
        if self._hearts.store is not None or self._watches:
            self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and self._hearts.store is not None and not self._end.is_set():
            self._hearts.say_why(error)
        self.end()

    def end(self) -> None:
        """Watch no longer: from here on ranks may go. Every rank must call this."""
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def met(self) -> None:
        """The ranks have their process group: from here on the run is to move, too."""
        self._has_met = True

    def tell(self, told: Told) -> None:
        """Have `told` called from here on, in place of the one before."""
        self._words.told = told

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A training step is inside: a rank that is late there is named, however busy it is."""
        self._main.in_step = True
        try:
            with self._watchdog.step():
                yield
            self._main.steps += 1
        finally:
            self._main.in_step = False

    @contextlib.contextmanager
    def named_if_missing(self) -> Iterator[None]:
        """What is inside meets other ranks: where it fails for want of one, that one is named (`end_if_missing`).

        The backend only knows a socket. Of several of these around each other the innermost looks.
        """
        try:
            yield
        except RuntimeError as error:
            watches = self._has_met and not self._end.is_set()
            if watches and error is not self._looked_into:
                self._looked_into = error
                self.end_if_missing()
            raise

    @contextlib.contextmanager
    def speaking(self) -> Iterator[None]:
        """What is inside says itself why the run ends, where it raises a MegatronExtError: the watch is silent then."""
        try:
            yield
        except MegatronExtError:
            if not self._once.acquire(blocking=False):
                time.sleep(2 * TELLING)  # the watch was first, and is about to end this process
            raise

    def end_if_missing(self, patience: float = 5.0) -> None:
        """After a collective has failed: end with exit code 2, as above, if that is because a rank is missing.

        Args:
            patience: seconds in which a rank of this host that has just died is noticed.
        """
        begun, heard = time.monotonic(), self._hearts.all_heard()
        silence = _SILENT_BEATS * BEAT
        while self._hearts.store is not None:
            lost, waited = None, time.monotonic() - begun
            with contextlib.suppress(RuntimeError):
                lost = self._hearts.missing()
            if lost is None and waited > silence:
                lost = self._hearts.silent_since(heard)  # of another host, where nobody else noticed
                self._silence = silence
            if lost is not None and self._once.acquire(blocking=False):
                self._words.say_lost(lost, self._silence, ends=False)
                raise SystemExit(2)
            if waited > max(patience, silence):  # after a look, however busy the machine is
                return
            time.sleep(0.2)

    def _watch(self) -> None:
        """The thread: beat, listen, and end the process where somebody is missed or nothing moves."""
        heard, heard_at, beats, next_beat, asleep = "", time.monotonic(), 0, 0.0, time.monotonic()
        neighbour, had_met = (self._hearts.rank + 1) % self._hearts.size, self._has_met
        while not self._end.wait(_LOOK):
            now, standing = time.monotonic(), self._main.look()
            if self._has_met and (why := self._watchdog.overdue(standing)) is not None:
                self._end_stalled(why, standing)
            if self._hearts.store is None:
                continue
            # This process itself was stopped: the others had no chance to be heard. Or until now they had more time.
            if now - asleep > _LOOK + BEAT or self._has_met != had_met:
                heard_at, had_met = now, self._has_met
            lost = None
            try:
                lost = self._hearts.missing(ask=now >= next_beat)
                if lost is None and now >= next_beat:
                    beats, next_beat = beats + 1, now + BEAT
                    self._hearts.beat(beats)
                    if self._has_met:
                        self._look_at_all(standing)
                    beat = self._hearts.heard(neighbour)
                    if beat != heard:
                        heard, heard_at = beat, now
                    elif now - heard_at > (patience := self._patience(neighbour)):
                        lost, self._silence = neighbour, patience
            except RuntimeError:
                # The launcher's store is gone: with rank 0's host, or at the end of a launcher, which ranks follow.
                if now - heard_at > SILENCE:
                    lost = 0
            # One that ends by itself may be the first of all of them, which meet the same fault.
            if lost is not None and not self._end.wait(OWN_END if self._hearts.why(lost) else 0):
                self._leave(lost)
            asleep = time.monotonic()

    def _look_at_all(self, standing: Standing) -> None:
        """Say where the main thread stands, and look whether others have given the run up."""
        self._standings.publish(standing)
        if self._standings.is_given_up():
            self._end_stalled("another rank has seen that the run no longer moves", standing)

    def _patience(self, rank: int) -> float:
        """Seconds without a heartbeat after which a rank is missed."""
        if self._has_met:
            return SILENCE
        if (peer := self._hearts.near(rank)) is None:
            return STARTING * SILENCE
        return SILENCE if peer.is_stopped else math.inf

    def _end_stalled(self, why: str, standing: Standing) -> None:
        """End, with this rank's stacks in a file and a message on what all ranks are at."""
        if self._end.is_set() or not self._once.acquire(blocking=False):
            return
        self._standings.say_stalled(why, standing)
        at_most(FILES, release_all)
        os._exit(2)

    def _leave(self, lost: int) -> None:
        if lost == self._hearts.rank or not self._once.acquire(blocking=False):
            return  # others miss this one, which was stopped and goes on; or the main thread is about to end
        self._words.say_lost(lost, self._silence)
        at_most(FILES, release_all)
        os._exit(2)
