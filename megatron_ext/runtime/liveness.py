"""Notices within a minute that a rank has died, stopped or hangs, and names it: hearts beat in the launcher's store.

A dead rank of this host is found by its process, one elsewhere or a stopped one by the silence of its heart. Each rank
listens to the next one and writes down whom it misses, which all others read. A rank that lives, but for which all
others wait, is named by rank 0 and not ended: it may come.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from megatron_ext.locks import process_identity, release_all
from megatron_ext.runtime.main_thread import MainThread, Standing, late_rank

log = logging.getLogger(__name__)

SILENCE = 40.0
"""Seconds without a heartbeat after which a rank is missed."""
PATIENCE = 40.0
"""Seconds that all others wait for a rank before it is called late."""
BEAT = 4.0
"""Seconds between heartbeats."""
_LOOK = 1.0
_LOST, _SPOKE = "lost", "spoke"


class Liveness:
    """Watches the other ranks while inside. Every rank must enter and leave it together, except after a failure.

    Where a rank is missed, all others end with exit code 2 and one of them says why; collectives that wait for the
    missing one cannot be left otherwise.
    """

    def __init__(self) -> None:
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._peers: list[dict[str, Any]] = [process_identity(os.getpid())]
        self._store: Any = None
        self._local: list[int] = []
        self._end = threading.Event()
        self._once = threading.Lock()
        self._thread: threading.Thread | None = None
        self._main = MainThread()
        self._late: int | None = None

    def __enter__(self) -> "Liveness":
        if self._size > 1 and "MASTER_ADDR" in os.environ:
            self._peers = [{}] * self._size
            dist.all_gather_object(self._peers, process_identity(os.getpid()))
            self._local = [rank for rank, peer in enumerate(self._peers) if rank != self._rank and _is_alive(peer)]
            self._store = _connect()
            self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None and self._store is not None:
            with contextlib.suppress(RuntimeError):  # the others learn that this rank ends and says itself why
                self._store.set(f"{_SPOKE}/{self._rank}", "1")
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A training step is inside: a rank that is late there is named, however busy it is."""
        self._main.in_step = True
        try:
            yield
            self._main.steps += 1
        finally:
            self._main.in_step = False

    def end_if_missing(self, patience: float = 5.0) -> None:
        """After a collective has failed: end with exit code 2, as above, if that is because a rank is missing.

        Args:
            patience: seconds in which a rank that has just died is noticed.
        """
        deadline = time.monotonic() + patience
        while self._store is not None and time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError):
                if (lost := self._missing()) is not None and self._once.acquire(blocking=False):
                    self._say(lost)
                    raise SystemExit(2)
            time.sleep(0.2)

    def _watch(self) -> None:
        """The thread: beat, listen, and end the process where somebody is missed."""
        heard, heard_at, beats, next_beat, asleep = "", time.monotonic(), 0, 0.0, time.monotonic()
        while not self._end.wait(_LOOK):
            now, standing = time.monotonic(), self._main.look()
            if now - asleep > _LOOK + BEAT:
                heard_at = now  # this process itself was stopped: the others had no chance to be heard
            lost = None
            try:
                lost = self._missing(ask=now >= next_beat)
                if lost is None and now >= next_beat:
                    beats, next_beat = beats + 1, now + BEAT
                    self._store.set(f"beat/{self._rank}", str(beats))
                    self._store.set(f"at/{self._rank}", json.dumps(dataclasses.astuple(standing)))
                    self._name_late()
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
            if lost is not None and not self._end.is_set():
                self._leave(lost)
            asleep = time.monotonic()

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
        release_all()
        os._exit(2)

    def _say(self, lost: int) -> None:
        """Say who is missing, unless another rank has, or the missing one itself."""
        is_first = True
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(_LOST, "", str(lost))
            is_first = self._store.add("said", 1) == 1 and not self._read(f"{_SPOKE}/{lost}")
        if is_first:
            with contextlib.suppress(OSError):
                os.write(2, f"error: {self._message(lost)}\n".encode())
        else:
            time.sleep(3)  # a launcher ends all once one has ended: whoever speaks first
        if lost in self._local and _is_alive(self._peers[lost]):
            with contextlib.suppress(OSError):  # stopped, it would keep the launcher waiting
                os.kill(self._peers[lost]["pid"], signal.SIGKILL)

    def _message(self, lost: int) -> str:
        peer = self._peers[lost]
        what = "has ended" if lost in self._local and not _is_alive(peer) else f"has not answered for {SILENCE:.0f} s"
        return (
            f"rank {lost} (process {peer['pid']} on {peer['host']}) {what}, without which the others cannot go on. "
            "Look for what ended or stopped it (memory, its host); the same command goes on from the newest checkpoint"
        )

    def _read(self, key: str) -> str:
        """What the store has under `key`, without waiting for it; "" if nothing."""
        return self._store.get(key).decode() if self._store.check([key]) else ""


def _connect() -> Any:
    """A connection of our own to the launcher's store: that of the process groups may be waiting in another thread."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=10),
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"megatron_ext/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{attempt}", store)


def _is_alive(peer: dict[str, Any]) -> bool:
    """Whether the process `peer` runs on this host, as far as this process sees the host's processes."""
    here = process_identity(peer["pid"])
    return here["started"] is not None and here == peer
