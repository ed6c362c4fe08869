"""Where the main threads of all ranks stand: names the one for which all wait, or all where nothing moves any more."""

import contextlib
import dataclasses
import json
import logging
import os
import socket
import time
from pathlib import Path

from megatron_ext.runtime.hearts import Hearts
from megatron_ext.runtime.last_words import TELLING, LastWords, at_most
from megatron_ext.runtime.main_thread import Standing, late_rank
from megatron_ext.runtime.watchdog import write_stack

log = logging.getLogger(__name__)

PATIENCE = 40.0
"""Seconds that all others wait for a rank before it is called late."""
STACKS = 20.0
"""Seconds that a stalled run waits for the stacks of all ranks."""
FILES = 10.0
"""Seconds that the end waits for a file system, which may be what hangs."""
_STALL, _STALL_SAID = "stall", "stall said"
_MOST_NAMED = 4


class Standings:
    """What all ranks are at, which each writes into the launcher's store.

    Args:
        directory: below which stacks are written.
    """

    def __init__(self, hearts: Hearts, words: LastWords, directory: Path) -> None:
        self._hearts, self._words, self._directory = hearts, words, directory
        self._late: int | None = None

    def publish(self, own: Standing) -> None:
        """Let the others know what this rank is at; on rank 0, look whether all others wait for one."""
        self._hearts.store.set(f"at/{self._hearts.rank}", json.dumps(dataclasses.astuple(own)))
        self._name_late()

    def _name_late(self) -> None:
        """Say once for which rank all others wait, and when it has come. Rank 0 does, if only by this thread."""
        keys, store = [f"at/{rank}" for rank in range(self._hearts.size)], self._hearts.store
        if self._hearts.rank or not store.check(keys):
            return
        standings = [Standing(*json.loads(said)) for said in store.multi_get(keys)]
        late = late_rank(standings, PATIENCE)
        if late == self._late:
            return
        if late is None:
            log.warning("rank %d has come; the run goes on", self._late)
        else:
            waited = min(standing.waiting for rank, standing in enumerate(standings) if rank != late)
            log.warning(
                "%s is late: all others have been waiting for it for %.0f s. It is at %s",
                *(self._hearts.name(late), waited, standings[late].place),
            )
        self._late = late

    def is_given_up(self) -> bool:
        """Whether another rank has seen that the run no longer moves."""
        return bool(self._hearts.read(_STALL))

    def say_stalled(self, why: str, own: Standing) -> None:
        """Write this rank's stacks; rank 0 says what all ranks are at, or whoever saw first that nothing moves."""
        hearts, named = self._hearts, time.strftime("%Y%m%d-%H%M%S")
        said = json.dumps([hearts.rank, why, named])
        with contextlib.suppress(RuntimeError):
            if hearts.store is not None:
                said = hearts.store.compare_set(_STALL, "", said).decode()
        finder, why, named = json.loads(said)
        folder = self._directory / named
        header = f"rank {hearts.rank} (process {os.getpid()} on {socket.gethostname()}): {why}"
        at_most(FILES, lambda: write_stack(folder, hearts.rank, header))
        alone = f"{why}. It is at {own.place}. Its stacks are in {folder}"
        try:
            if hearts.store is None:
                self._words.speak(alone)
                self._words.tell("stall", alone)
            else:
                self._say_for_all(why, finder, own, folder)
        except RuntimeError:  # the store is gone
            self._words.speak(alone)

    def _say_for_all(self, why: str, finder: int, own: Standing, folder: Path) -> None:
        """Say once for all ranks where they stand, as rank 0 or, where that does not answer, as the one that saw it."""
        standings, rank = self._all(own), self._hearts.rank
        # A launcher ends all once one has ended: nobody ends before rank 0 has told those who are told.
        is_said = rank != 0 and self._wait_for([_STALL_SAID], 2 * STACKS + TELLING)
        if rank == 0 or (rank == finder and not is_said):
            text = f"{why}. {self._who(standings)}. Every rank's stack is in {folder}"
            self._words.speak(text)
            self._words.tell("stall", text)
            self._hearts.store.set(_STALL_SAID, "1")

    def _all(self, own: Standing) -> list[Standing | None]:
        """What all ranks are at once they have written their stacks; None for one that does not answer."""
        keys = [f"stack/{rank}" for rank in range(self._hearts.size)]
        self._hearts.store.set(keys[self._hearts.rank], json.dumps(dataclasses.astuple(own)))
        if self._hearts.rank == 0:
            self._wait_for(keys, STACKS)
        return [Standing(*json.loads(text)) if (text := self._hearts.read(key)) else None for key in keys]

    def _wait_for(self, keys: list[str], seconds: float) -> bool:
        """Whether the store has all `keys` within so many seconds."""
        deadline = time.monotonic() + seconds
        while not (there := self._hearts.store.check(keys)) and time.monotonic() < deadline:
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
            standing = standings[rank]
            place = standing.place if standing is not None else "a place that it does not say"
            named.append(f"{self._hearts.name(rank)} is at {place}")
        more = f" and {len(held) - _MOST_NAMED} more" if len(held) > _MOST_NAMED else ""
        others = ", the others wait" if len(held) < self._hearts.size else ""
        return "; ".join(named) + more + others
