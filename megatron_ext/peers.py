"""Which process each rank is: told in the store through which the ranks meet, before any of them waits for another."""

import contextlib
import dataclasses
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_ext.launcher import attempt
from megatron_ext.locks import process_identity, state_of_process

if TYPE_CHECKING:  # a run of one process says what is wrong with it before torch is imported
    from torch.distributed import Store


@dataclass(frozen=True)
class Peer:
    """The process of a rank, for those that look for it."""

    host: str
    boot: str | None
    pid: int
    started: str | None
    """As in `process_identity`."""
    numbered_by: str | None
    """The namespace of its number: containers of one host each number their own processes."""

    @classmethod
    def own(cls) -> "Peer":
        """This process."""
        namespace = None
        with contextlib.suppress(OSError):
            namespace = os.readlink("/proc/self/ns/pid")
        return cls(**process_identity(os.getpid()), numbered_by=namespace)

    @property
    def neighbourhood(self) -> str:
        """The same for processes that see each other."""
        return f"{self.host} {self.boot} {self.numbered_by}"

    @property
    def is_alive(self) -> bool:
        """Whether it runs; for one of this neighbourhood."""
        return state_of_process(self.pid, self.started) is not None

    @property
    def is_stopped(self) -> bool:
        """Whether somebody has stopped it, as by SIGSTOP; for one of this neighbourhood."""
        return state_of_process(self.pid, self.started) == "T"


class Peers:
    """The processes of all ranks, as far as they have told.

    Args:
        store: a connection to the ranks' store; None for a rank that is alone. Where it has gone, what asks it is a
            RuntimeError.
    """

    def __init__(self, rank: int, store: "Store | None") -> None:
        self._rank, self._own = rank, Peer.own()
        self._known = {rank: self._own}
        self._near: dict[int, Peer] = {}
        self._store: Any = None
        if store is not None:
            import torch.distributed as dist

            self._store = dist.PrefixStore(f"peers/{attempt()}", store)

    def introduce(self) -> None:
        """Tell the others which process this rank is."""
        if self._store is not None and not self._store.check([f"{self._rank}"]):
            self._store.set(f"{self._rank}", json.dumps(dataclasses.astuple(self._own)))
            self._store.append(self._own.neighbourhood, f"{self._rank} ")

    def meet_neighbours(self) -> None:
        """Get to know the processes of this host that have told since the last time."""
        if self._store is None or self._own.started is None:  # or this system does not show processes
            return
        if not self._store.check([self._own.neighbourhood]):
            return
        near = {int(rank) for rank in self._store.get(self._own.neighbourhood).split()} - {self._rank}
        for rank in sorted(near - self._near.keys()):
            if (peer := self.of(rank)) is not None:
                self._near[rank] = peer

    @property
    def near(self) -> dict[int, Peer]:
        """The processes of this host that it has met, but for its own, by rank."""
        return self._near

    def of(self, rank: int) -> Peer | None:
        """The process of a rank; None where it has not told."""
        if rank not in self._known and self._store is not None and self._store.check([f"{rank}"]):
            self._known[rank] = Peer(*json.loads(self._store.get(f"{rank}")))
        return self._known.get(rank)
