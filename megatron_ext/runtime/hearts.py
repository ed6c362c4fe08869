"""The hearts of all ranks, which beat in the launcher's store: who is missing, and with what one has ended."""

import contextlib
import datetime
import os
from typing import Any

import torch.distributed as dist

from megatron_ext.errors import MegatronExtError
from megatron_ext.launcher import attempt
from megatron_ext.peers import Peer, Peers
from megatron_ext.roll_call import Answer, ended_by_launcher

_LOST, _SAID = "lost", "said"
_LONGEST_WHY = 500


class Hearts:
    """What this rank knows of all ranks: those of its host by their processes, others by what they say in the store.

    Without a launcher it knows itself alone, and `store` is None. A store that has gone is a RuntimeError of any method
    that asks it.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.store: Any = None
        self._connection: Any = None
        self._ended: Answer | None = None
        """The rank of which a launcher has said so: known from then on, for with that launcher the store may go."""
        self._peers = Peers(rank, None)

    def connect(self) -> None:
        """Join the others. Every rank calls this; it waits for none."""
        if self.size == 1 or "MASTER_ADDR" not in os.environ:
            return
        self._connection = _connect()
        self.store = dist.PrefixStore(f"megatron_ext/{attempt()}", self._connection)
        self._peers = Peers(self.rank, self._connection)
        self._peers.introduce()

    def read(self, key: str) -> str:
        """What the store has under `key`, without waiting for it; "" if nothing."""
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def beat(self, number: int) -> None:
        """Be heard, with a number that no beat before it has had."""
        self.store.set(f"beat/{self.rank}", str(number))

    def heard(self, rank: int) -> str:
        """The last beat of a rank; "" before its first."""
        return self.read(f"beat/{rank}")

    def all_heard(self) -> list[str] | None:
        """The last beat of every rank; None where the store is gone, with the host of rank 0."""
        try:
            return [self.heard(rank) for rank in range(self.size)] if self.store is not None else []
        except RuntimeError:
            return None

    def silent_since(self, before: list[str] | None) -> int | None:
        """The first rank whose heart has not beaten since `before`, where this one's has."""
        beats = self.all_heard()
        if beats is None or before is None:
            return 0
        if beats[self.rank] == before[self.rank]:
            return None
        return next((rank for rank, beat in enumerate(beats) if beat == before[rank]), None)

    def missing(self, *, ask: bool = True) -> int | None:
        """A rank known to be missing; with `ask`, to anybody. The first one: others end because of it."""
        if ask:
            self._peers.meet_neighbours()
            if written := self.read(_LOST):
                return int(written)
            self._ask_launcher()
        if self._ended is not None:
            return self._ended.rank
        return next((rank for rank, peer in self._peers.near.items() if not peer.is_alive), None)

    def near(self, rank: int) -> Peer | None:
        """The process of another rank of this host; None of any other."""
        return self._peers.near.get(rank)

    def name(self, rank: int) -> str:
        """A rank for messages, such as "rank 1 (process 4711 on node0)"."""
        peer = None
        with contextlib.suppress(RuntimeError):
            peer = self._peers.of(rank)
        return f"rank {rank}" + (f" (process {peer.pid} on {peer.host})" if peer is not None else "")

    def speaks_for_its_host(self, lost: int) -> bool:
        """Whether this rank is the first of its host, where the lost one has not spoken itself."""
        return lost not in self._peers.near and all(self.rank < rank for rank in self._peers.near)

    def give_up(self, lost: int) -> None:
        """Let all know that a rank is missing, if none is yet."""
        self.store.compare_set(_LOST, "", str(lost))

    def is_first_to_say(self) -> bool:
        """Whether no rank has asked this before."""
        return bool(self.store.add(_SAID, 1) == 1)

    def say_why(self, error: BaseException) -> None:
        """Let the others know that this rank ends, and why: unless all do, they are to end with it."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"why/{self.rank}", _reason(error))
            if not (isinstance(error, MegatronExtError) and error.is_everywhere):
                self.give_up(self.rank)

    def why(self, rank: int) -> str:
        """With what a rank has ended, as it says itself or its launcher; "" where none does."""
        with contextlib.suppress(RuntimeError):
            if said := self.read(f"why/{rank}"):
                return said
            self._ask_launcher()
        ended = self._ended
        return f"it {ended.refusal[1]}" if ended and ended.refusal and ended.rank == rank else ""

    def _ask_launcher(self) -> None:
        """Know whether a launcher has said that a rank ended."""
        if self._ended is None and (ended := ended_by_launcher(self._connection)) is not None:
            self._peers.of(ended.rank)
            self._ended = ended


def _reason(error: BaseException) -> str:
    """An error in a line."""
    said = " ".join(str(error).split())
    if not isinstance(error, MegatronExtError):
        said = f"{type(error).__name__}: {said}"
    return said[:_LONGEST_WHY]


def _connect() -> Any:
    """A connection of our own to the launcher's store: that of the process groups may be waiting in another thread."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=10),
    )
