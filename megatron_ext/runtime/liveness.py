"""Notices within a minute that a rank has died, stopped or hangs, and names it: hearts beat in the launcher's store.

A dead rank of this host is found by its process, one elsewhere or a stopped one by the silence of its heart. Each rank
listens to the next one and writes down whom it misses, which all others read. A rank that lives, but for which all
others wait, is named by rank 0 and not ended: it may come. Where it does not come, the watchdog of one rank or another
ends all of them, with every rank's stack in a file.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ext.config import WatchdogConfig
from megatron_ext.errors import MegatronExtError
from megatron_ext.locks import process_identity, release_all
from megatron_ext.roll_call import attempt
from megatron_ext.runtime.main_thread import MainThread, Standing, late_rank
from megatron_ext.runtime.watchdog import Watchdog, write_stack

log = logging.getLogger(__name__)

SILENCE = 40.0
"""Seconds without a heartbeat after which a rank is missed."""
PATIENCE = 40.0
"""Seconds that all others wait for a rank before it is called late."""
BEAT = 4.0
"""Seconds between heartbeats."""
STACKS = 20.0
"""Seconds that a stalled run waits for the stacks of all ranks."""
TELLING = 20.0
"""Seconds that those who are told of the end have for it."""
FILES = 10.0
"""Seconds that the end waits for a file system, which may be what hangs."""
_SILENT_BEATS = 3
"""Heartbeats of a rank that are missed in a row, once a collective has failed, before it is called lost."""
_LOOK = 1.0
_OWN_END = 5.0
"""Seconds in which a rank may meet the fault with which another one has ended."""
_LONGEST_WHY = 500
_LOST, _WHY, _STALL, _STALL_SAID = "lost", "why", "stall", "stall said"
_MOST_NAMED = 4

Told = Callable[[str, str, bool], None]
"""Takes the kind of an event that ends the run (`lost_rank`, `stall`), a line on it, and whether the process ends right
after, so that this is the last moment to finish records. Called on rank 0, by a thread of its own."""


def tell_nobody(kind: str, text: str, ends: bool) -> None:
    """For runs that nobody is told of."""


class Liveness:
    """Watches the other ranks while inside. Every rank must enter and leave it together, except after a failure.

    Where a rank is missed or nothing moves, all end with exit code 2 and one of them says why; collectives that wait
    for the missing one cannot be left otherwise.

    Args:
        directory: below which stacks are written.
        told: of what ends the run so; may be set to another meanwhile.
        way_out: what to do then; the end of the message.
    """

    def __init__(
        self,
        limits: WatchdogConfig | None = None,
        directory: Path | None = None,
        told: Told = tell_nobody,
        way_out: str = "the same command goes on from the newest checkpoint",
    ) -> None:
        self._way_out = way_out
        self._watchdog = Watchdog(limits or WatchdogConfig(enabled=False))
        self._watches = limits is not None and limits.enabled
        self._directory, self.told = directory or Path(), told
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._peers: list[dict[str, Any]] = [process_identity(os.getpid())]
        self._store: Any = None
        self._local: list[int] = []
        self._end = threading.Event()
        self._once = threading.Lock()
        self._thread: threading.Thread | None = None
        self._main = MainThread()
        self._late: int | None = None
        self._silence = SILENCE
        self._looked_into: RuntimeError | None = None

    def __enter__(self) -> "Liveness":
        if self._size > 1 and "MASTER_ADDR" in os.environ:
            self._peers = [{}] * self._size
            dist.all_gather_object(self._peers, process_identity(os.getpid()))
            self._local = [rank for rank, peer in enumerate(self._peers) if rank != self._rank and _is_alive(peer)]
            self._store = _connect()
        if self._store is not None or self._watches:
            self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and self._store is not None:
            with contextlib.suppress(RuntimeError):  # the others learn that this rank ends, and why
                self._store.set(f"{_WHY}/{self._rank}", _reason(error))
                if not (isinstance(error, MegatronExtError) and error.is_everywhere):
                    self._store.compare_set(_LOST, "", str(self._rank))
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

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
            if error is not self._looked_into:
                self._looked_into = error
                self.end_if_missing()
            raise

    def end_if_missing(self, patience: float = 5.0) -> None:
        """After a collective has failed: end with exit code 2, as above, if that is because a rank is missing.

        Args:
            patience: seconds in which a rank of this host that has just died is noticed.
        """
        begun, heard = time.monotonic(), self._beats()
        silence = _SILENT_BEATS * BEAT
        while self._store is not None:
            lost, waited = None, time.monotonic() - begun
            with contextlib.suppress(RuntimeError):
                lost = self._missing()
            if lost is None and waited > silence:
                lost = self._silent_since(heard)  # of another host, where nobody else noticed
                self._silence = silence
            if lost is not None and self._once.acquire(blocking=False):
                self._say(lost, ends=False)
                raise SystemExit(2)
            if waited > max(patience, silence):  # after a look, however busy the machine is
                return
            time.sleep(0.2)

    def _beats(self) -> list[str] | None:
        """The heartbeat of every rank; None where the store is gone, with the host of rank 0."""
        try:
            return [self._read(f"beat/{rank}") for rank in range(self._size)] if self._store is not None else []
        except RuntimeError:
            return None

    def _silent_since(self, heard: list[str] | None) -> int | None:
        """The first rank whose heart has not beaten since `heard`, where this one's has."""
        beats = self._beats()
        if beats is None or heard is None:
            return 0
        if beats[self._rank] == heard[self._rank]:
            return None
        return next((rank for rank, beat in enumerate(beats) if beat == heard[rank]), None)

    def _watch(self) -> None:
        """The thread: beat, listen, and end the process where somebody is missed or nothing moves."""
        heard, heard_at, beats, next_beat, asleep = "", time.monotonic(), 0, 0.0, time.monotonic()
        while not self._end.wait(_LOOK):
            now, standing = time.monotonic(), self._main.look()
            if (why := self._watchdog.overdue(standing)) is not None:
                self._end_stalled(why, standing)
            if self._store is None:
                continue
            if now - asleep > _LOOK + BEAT:
                heard_at = now  # this process itself was stopped: the others had no chance to be heard
            lost = None
            try:
                lost = self._missing(ask=now >= next_beat)
                if lost is None and now >= next_beat:
                    beats, next_beat = beats + 1, now + BEAT
                    self._beat(beats, standing)
                    neighbour = (self._rank + 1) % self._size
                    beat = self._read(f"beat/{neighbour}")
                    if beat != heard:
                        heard, heard_at = beat, now
                    elif now - heard_at > SILENCE:
                        lost = neighbour
            except RuntimeError:
                # The launcher's store is gone: with rank 0's host, or at the end of a launcher, which ranks follow.
                if now - heard_at > SILENCE:
                    lost = 0
            # One that ends by itself may be the first of all of them, which meet the same fault.
            if lost is not None and not self._end.wait(_OWN_END if self._why(lost) else 0):
                self._leave(lost)
            asleep = time.monotonic()

    def _beat(self, number: int, standing: Standing) -> None:
        """Be heard, say where the main thread stands, and look whether others have given the run up."""
        self._store.set(f"beat/{self._rank}", str(number))
        self._store.set(f"at/{self._rank}", json.dumps(dataclasses.astuple(standing)))
        self._name_late()
        if self._read(_STALL):
            self._end_stalled("another rank has seen that the run no longer moves", standing)

    def _end_stalled(self, why: str, standing: Standing) -> None:
        """Write this rank's stacks and end; rank 0 says what all ranks are at, or whoever saw it first."""
        if self._end.is_set() or not self._once.acquire(blocking=False):
            return
        named = time.strftime("%Y%m%d-%H%M%S")
        said = json.dumps([self._rank, why, named])
        with contextlib.suppress(RuntimeError):
            if self._store is not None:
                said = self._store.compare_set(_STALL, "", said).decode()
        finder, why, named = json.loads(said)
        folder = self._directory / named
        header = f"rank {self._rank} (process {os.getpid()} on {socket.gethostname()}): {why}"
        _at_most(FILES, lambda: write_stack(folder, self._rank, header))
        alone = f"{why}. It is at {standing.place}. Its stacks are in {folder}"
        try:
            if self._store is None:
                self._speak(alone)
                self._tell("stall", alone)
            else:
                self._say_stalled(why, finder, standing, folder)
        except RuntimeError:  # the store is gone
            self._speak(alone)
        _at_most(FILES, release_all)
        os._exit(2)

    def _say_stalled(self, why: str, finder: int, standing: Standing, folder: Path) -> None:
        """Say once for all ranks where they stand, as rank 0 or, where that does not answer, as the one that saw it."""
        standings = self._all_standings(standing)
        # A launcher ends all once one has ended: nobody ends before rank 0 has told those who are told.
        is_said = self._rank != 0 and self._wait_for([_STALL_SAID], 2 * STACKS + TELLING)
        if self._rank == 0 or (self._rank == finder and not is_said):
            text = f"{why}. {self._who(standings)}. Every rank's stack is in {folder}"
            self._speak(text)
            self._tell("stall", text)
            self._store.set(_STALL_SAID, "1")

    def _all_standings(self, own: Standing) -> list[Standing | None]:
        """What all ranks are at once they have written their stacks; None for one that does not answer."""
        keys = [f"stack/{rank}" for rank in range(self._size)]
        self._store.set(keys[self._rank], json.dumps(dataclasses.astuple(own)))
        if self._rank == 0:
            self._wait_for(keys, STACKS)
        return [Standing(*json.loads(text)) if (text := self._read(key)) else None for key in keys]

    def _wait_for(self, keys: list[str], seconds: float) -> bool:
        """Whether the store has all `keys` within so many seconds."""
        deadline = time.monotonic() + seconds
        while not (there := self._store.check(keys)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return bool(there)

    def _who(self, standings: list[Standing | None]) -> str:
        """For whom the others wait, as far as their standings say."""
        held = [rank for rank, standing in enumerate(standings) if standing is None or not standing.waiting]
        if not held:
            assert standings[0] is not None
            return f"All ranks wait for each other, rank 0 at {standings[0].place}"
        named = []
        for rank in held[:_MOST_NAMED]:
            standing, peer = standings[rank], self._peers[rank]
            place = standing.place if standing is not None else "a place that it does not say"
            named.append(f"rank {rank} (process {peer['pid']} on {peer['host']}) is at {place}")
        more = f" and {len(held) - _MOST_NAMED} more" if len(held) > _MOST_NAMED else ""
        others = ", the others wait" if len(held) < self._size else ""
        return "; ".join(named) + more + others

    def _name_late(self) -> None:
        """Say once for which rank all others wait, and when it has come. Rank 0 does, if only by this thread."""
        keys = [f"at/{rank}" for rank in range(self._size)]
        if self._rank or not self._store.check(keys):
            return
        standings = [Standing(*json.loads(said)) for said in self._store.multi_get(keys)]
        late = late_rank(standings, PATIENCE)
        if late == self._late:
            return
        if late is None:
            log.warning("rank %d has come; the run goes on", self._late)
        else:
            waited = min(standing.waiting for rank, standing in enumerate(standings) if rank != late)
            log.warning(
                "rank %d (process %d on %s) is late: all others have been waiting for it for %.0f s. It is at %s",
                *(late, self._peers[late]["pid"], self._peers[late]["host"], waited, standings[late].place),
            )
        self._late = late

    def _missing(self, *, ask: bool = True) -> int | None:
        """A rank known to be missing; with `ask`, to anybody. The first one: others end because of it."""
        if ask and (written := self._read(_LOST)):
            return int(written)
        return next((rank for rank in self._local if not _is_alive(self._peers[rank])), None)

    def _leave(self, lost: int) -> None:
        if lost == self._rank or not self._once.acquire(blocking=False):
            return  # others miss this one, which was stopped and goes on; or the main thread is about to end
        self._say(lost)
        _at_most(FILES, release_all)
        os._exit(2)

    def _say(self, lost: int, *, ends: bool = True) -> None:
        """Say who is missing, unless another rank has, or the missing one itself."""
        why = self._why(lost)
        is_first, text = True, self._message(lost, why)
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(_LOST, "", str(lost))
            is_first = self._store.add("said", 1) == 1
        if why:
            is_first = self._speaks_for_its_host(lost)
        if is_first:
            self._speak(text, "" if why else self._way_out)
        if self._rank == 0:
            self._tell("lost_rank", text, ends=ends)
        elif not is_first:
            time.sleep(3)  # a launcher ends all once one has ended: whoever speaks first
        self._let_speak(lost if why else None)
        if lost in self._local and _is_alive(self._peers[lost]):
            with contextlib.suppress(OSError):  # stopped, it would keep the launcher waiting
                os.kill(self._peers[lost]["pid"], signal.SIGKILL)

    def _let_speak(self, ending: int | None) -> None:
        """Wait until a rank of this host that says itself why it ends has ended: a launcher would end it with this."""
        deadline = time.monotonic() + TELLING + _OWN_END
        while ending in self._local and _is_alive(self._peers[ending]) and time.monotonic() < deadline:
            time.sleep(0.2)

    def _speak(self, text: str, way_out: str | None = None) -> None:
        way_out = self._way_out if way_out is None else way_out
        with contextlib.suppress(OSError):
            os.write(2, f"error: {'; '.join(filter(None, (text, way_out)))}\n".encode())

    def _tell(self, kind: str, text: str, *, ends: bool = True) -> None:
        """Tell those who are told why the run ends; they cannot hold it up."""
        _at_most(TELLING, lambda: self.told(kind, text, ends))

    def _why(self, rank: int) -> str:
        """With what a rank has ended; "" where it has not said so."""
        with contextlib.suppress(RuntimeError):
            return self._read(f"{_WHY}/{rank}")
        return ""

    def _speaks_for_its_host(self, lost: int) -> bool:
        """Whether this rank is the first of its host, where the lost one has not spoken itself."""
        host = self._peers[self._rank]["host"]
        hosts = [peer["host"] for peer in self._peers]
        return host != hosts[lost] and hosts.index(host) == self._rank

    def _message(self, lost: int, why: str) -> str:
        peer = self._peers[lost]
        if why:
            return f"rank {lost} (process {peer['pid']} on {peer['host']}) has ended: {why}"
        what = (
            "has ended"
            if lost in self._local and not _is_alive(peer)
            else f"has not answered for {self._silence:.0f} s"
        )
        return (
            f"rank {lost} (process {peer['pid']} on {peer['host']}) {what}, without which the others cannot go on. "
            "Look for what ended or stopped it (memory, its host)"
        )

    def _read(self, key: str) -> str:
        """What the store has under `key`, without waiting for it; "" if nothing."""
        return self._store.get(key).decode() if self._store.check([key]) else ""


def _reason(error: BaseException) -> str:
    """An error in a line."""
    said = " ".join(str(error).split())
    if not isinstance(error, MegatronExtError):
        said = f"{type(error).__name__}: {said}"
    return said[:_LONGEST_WHY]


def _at_most(seconds: float, work: Callable[[], None]) -> None:
    """Do `work` on a thread of its own and wait so long for it: what hangs there holds up nobody."""
    thread = threading.Thread(target=work, name=f"at most {seconds:g} s", daemon=True)
    thread.start()
    thread.join(seconds)


def _connect() -> Any:
    """A connection of our own to the launcher's store: that of the process groups may be waiting in another thread."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=10),
    )
    return dist.PrefixStore(f"megatron_ext/{attempt()}", store)


def _is_alive(peer: dict[str, Any]) -> bool:
    """Whether the process `peer` runs on this host, as far as this process sees the host's processes."""
    here = process_identity(peer["pid"])
    return here["started"] is not None and here == peer
