"""Whether every rank can start, asked before any waits for the others: one that cannot ends all, with its reason.

The ranks answer in the store through which their process group will meet. So a rank that refuses its configuration, or
what it finds on its node, is not a connection for which the others wait until it times out.
"""

import contextlib
import datetime
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeVar

from megatron_ext.errors import EnvironmentFault, MegatronExtError
from megatron_ext.launcher import attempt, keeps_store, launched_rank, launched_world_size, raise_if_interrupted
from megatron_ext.peers import Peers

if TYPE_CHECKING:  # a run of one process says what is wrong with it before torch is imported
    from torch.distributed import PrefixStore, Store

T = TypeVar("T")

DEFAULT_MINUTES = 10.0
"""As `runtime.distributed_timeout_minutes`, for ranks that do not have their configuration yet."""
_MORE = 5.0
"""Seconds in which others may refuse too, once one has."""
_HEARD = 30.0
"""Seconds that a rank stays until all have heard who refuses: with its node the store may go."""
_LOOK = 0.05
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_ENDED, _TELLING = "ended", 5.0
"""What a launcher says of a rank that could not, and the seconds that it tries to."""
_READ = 6.0
"""Seconds in which all ranks look for that, at each heartbeat."""
_SHOWN = 8


@dataclass(frozen=True)
class Answer:
    """What a rank says of its own start."""

    rank: int
    host: str
    refusal: tuple[type[MegatronExtError], str] | None
    """Kind of the error and what it says; None where it can start."""

    def written(self) -> str:
        """As text for the store: nothing that comes over a network is unpickled."""
        kind, text = self.refusal or (None, None)
        return json.dumps([self.rank, self.host, kind and kind.__name__, text])

    @classmethod
    def read(cls, written: bytes) -> Self:
        """The answer that was written so. An error that is none of ours is an EnvironmentFault."""
        rank, host, kind, text = json.loads(written)
        kinds = {one.__name__: one for one in MegatronExtError.__subclasses__()}
        return cls(rank, host, None if kind is None else (kinds.get(kind, EnvironmentFault), text))


def on_every_rank(
    what: str, prepare: Callable[[], T], minutes: float = DEFAULT_MINUTES, *, looking: int | None = None
) -> T:
    """What `prepare` makes on this rank, once it has on every rank; every rank must call this.

    Args:
        what: names this roll call; each has its own.
        minutes: how long the last rank is waited for.
        looking: how many ranks look at what may be wrong, the others doing nothing; all of them, if not said.

    Raises:
        MegatronExtError: it failed on a rank; on every rank, naming those it failed on.
        EnvironmentFault: not all ranks have come.
    """
    size = launched_world_size()
    if size == 1 or not all(name in os.environ for name in _ADDRESS):
        return prepare()
    try:
        made, failure = prepare(), None
    except Exception as error:  # noqa: BLE001 - said to the others, and raised here
        failure = error
    call = _RollCall(what, size, min(minutes, 0.5) if failure is not None else minutes)
    try:
        answers = call.answers(_refusal_of(failure) if failure is not None else None)
    except EnvironmentFault:
        if failure is not None:
            raise failure from None  # that nobody hears it is no news
        raise
    if failure is not None and not isinstance(failure, MegatronExtError):
        raise failure  # as it is; the others have been told
    if any(answer.refusal is not None for answer in answers):
        raise refused(answers, looking or size)
    return made


def refused(answers: Sequence[Answer], looking: int) -> MegatronExtError:
    """The error that every rank raises where some refuse. Of a fault that all meet who look for it, none is named."""
    alike: dict[tuple[type[MegatronExtError], str], list[Answer]] = {}
    for answer in answers:
        if answer.refusal is not None:
            alike.setdefault(answer.refusal, []).append(answer)
    kind, text = next(iter(alike))
    if len(alike) > 1 or len(alike[kind, text]) < looking:
        text = "\n".join(f"{_named(ranks)}: {said}" for (_, said), ranks in itertools.islice(alike.items(), _SHOWN))
        text += f"\nand {len(alike) - _SHOWN} more" if len(alike) > _SHOWN else ""
    return kind(text).everywhere(speaks=_speaks(answers))


def _named(ranks: Sequence[Answer]) -> str:
    """Who they are, and where."""
    hosts = list(dict.fromkeys(answer.host for answer in ranks))
    where = ", ".join(hosts[:_SHOWN]) + (f" and {len(hosts) - _SHOWN} more" if len(hosts) > _SHOWN else "")
    return f"rank{'s' * (len(ranks) > 1)} {_numbers([answer.rank for answer in ranks])} on {where}"


def _numbers(ranks: Sequence[int]) -> str:
    """As "0 to 7, 16"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    shown = [f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs[:_SHOWN]]
    return ", ".join(shown) + (" and more" if len(runs) > _SHOWN else "")


class _RollCall:
    """One round of answers in the store."""

    def __init__(self, what: str, size: int, minutes: float) -> None:
        self._what, self._size, self._rank = what, size, launched_rank()
        self._minutes, self._deadline = minutes, time.monotonic() + 60 * minutes

    def answers(self, refusal: tuple[type[MegatronExtError], str] | None) -> list[Answer]:
        """What the ranks say: all of them, or those that have spoken when one refuses."""
        store = _meeting_store(self._minutes)
        own = Answer(self._rank, socket.gethostname(), refusal)
        try:
            store.set(self._key(self._rank), own.written())
            store.add(self._key("spoken"), 1)
            if refusal is not None:
                store.set(self._key("refused"), "1")
            self._wait(store)
            keys = [key for rank in range(self._size) if store.check([key := self._key(rank)])]
            answers = [Answer.read(said) for said in store.multi_get(keys)]
            if ended := _ended(store, answers):
                answers = [ended, *(answer for answer in answers if answer.rank != ended.rank)]
            if any(answer.refusal is not None for answer in answers):
                self._stay(store, self._size, _HEARD if ended is None else _READ)
        except RuntimeError as error:
            raise EnvironmentFault(
                f"the ranks do not meet any more: what kept {_place()} on the node of rank 0 has ended "
                f"({_first_line(error)}). Look there for its reason, and start the same command again on every node"
            ) from error
        return answers

    def _key(self, name: str | int) -> str:
        return f"{self._what}/{name}"

    def _wait(self, store: "PrefixStore") -> None:
        """Wait until all have spoken, or a little after one has refused, or until one is known never to come."""
        until = self._deadline
        while (spoken := store.add(self._key("spoken"), 0)) < self._size:
            raise_if_interrupted()
            if store.check([_ENDED]):
                return  # what it had to say it has said; and with its launcher the store may go
            if until == self._deadline and store.check([self._key("refused")]):
                until = min(self._deadline, time.monotonic() + _MORE)
            if time.monotonic() < until:
                time.sleep(_LOOK)
            elif until < self._deadline or store.check([self._key("refused")]):
                return
            else:
                missing = _numbers([rank for rank in range(self._size) if not store.check([self._key(rank)])])
                came = f"{spoken} of {self._size} ranks have come to {_place()} within {self._minutes:g} minutes"
                self._stay(store, spoken, _HEARD)
                raise EnvironmentFault(_not_met(f"{came}, not rank {missing}"))

    def _stay(self, store: "PrefixStore", ranks: int, seconds: float) -> None:
        """Stay until so many ranks have heard how it ends, or for so long: the others are taken not to come."""
        until = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):  # gone with the node that has it: all there have heard
            heard = store.add(self._key("heard"), 1)
            while heard < ranks and time.monotonic() < until:
                time.sleep(_LOOK)
                heard = store.add(self._key("heard"), 0)


_met: dict[str, "PrefixStore"] = {}
"""The connection of this process, by where it leads; kept until the process ends."""


def _meeting_store(minutes: float) -> "PrefixStore":
    """The store through which the ranks meet: the launcher's, or what rank 0 keeps in its stead.

    The process group finds that of rank 0 at the same address. All roll calls share one connection: a store that has
    gone since the last one is known at once by its loss, and not waited for anew.

    Raises:
        EnvironmentFault: it was not to be reached within so many minutes.
    """
    import torch.distributed as dist

    if (place := f"{_place()} {attempt()}") in _met:
        return _met[place]
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=launched_rank() == 0 and not keeps_store(),
            wait_for_workers=False,
            timeout=datetime.timedelta(minutes=minutes),
            multi_tenant=True,
        )
        Peers(launched_rank(), store).introduce()
    except (RuntimeError, ValueError) as error:
        raise EnvironmentFault(_not_met(_first_line(error))) from error
    return _met.setdefault(place, dist.PrefixStore(_part(attempt()), store))


def tell_of_end(address: str, port: int, run_id: str, rank: int, how: str, *, keeps_store: bool = False) -> None:
    """Tell the ranks that wait in a roll call, or come to one, that `rank` of this host ended without a word.

    For its launcher, which alone knows. Where nobody keeps their store any more they know it by that.

    Args:
        run_id: the launcher's name for the run, for ranks that it starts once.
        how: it ended.
        keeps_store: their store ends with this process, which stays until all have had the time to read there.
    """
    import torch.distributed as dist

    said = Answer(rank, socket.gethostname(), (EnvironmentFault, how)).written()
    seconds = datetime.timedelta(seconds=_TELLING)
    with contextlib.suppress(RuntimeError, ValueError):
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=seconds)
        dist.PrefixStore(_part(f"{run_id}/0"), store).set(_ENDED, said)
        if keeps_store:
            time.sleep(_READ)


def ended_by_launcher(store: "Store") -> Answer | None:
    """The rank of which its launcher has said so (`tell_of_end`), by any connection to the ranks' store."""
    import torch.distributed as dist

    calls = dist.PrefixStore(_part(attempt()), store)
    return Answer.read(calls.get(_ENDED)) if calls.check([_ENDED]) else None


def _ended(store: "PrefixStore", answers: Sequence[Answer]) -> Answer | None:
    """What a launcher has said of a rank that ended, unless that has said itself why."""
    ended = ended_by_launcher(store.underlying_store)
    is_said = any(answer.refusal is not None and answer.rank == ended.rank for answer in answers) if ended else True
    return None if is_said else ended


def _part(attempt: str) -> str:
    """Where the roll calls of an attempt are in the ranks' store."""
    return f"roll call/{attempt}"


def _place() -> str:
    return ":".join(os.environ[name] for name in _ADDRESS)


def _first_line(error: Exception) -> str:
    """What torch says, without the frames of its C++."""
    return str(error).strip().partition("\n")[0]


def _not_met(why: str) -> str:
    return (
        f"the ranks did not meet: {why}. Look whether the same command has started on every node, and reaches "
        f"{':'.join(_ADDRESS)} = {_place()}"
    )


def _refusal_of(error: Exception) -> tuple[type[MegatronExtError], str]:
    """What the others are told of `error`, a fault of the user's or not."""
    if isinstance(error, MegatronExtError):
        return type(error), str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return EnvironmentFault, f"{error.filename}: {error.strerror}"
    return EnvironmentFault, f"{type(error).__name__}: {error}"


def _speaks(answers: Sequence[Answer]) -> bool:
    """Whether this rank says for its node what all know: the first one there of those that have answered."""
    host = socket.gethostname()
    first = min((answer.rank for answer in answers if answer.host == host), default=launched_rank())
    return first == launched_rank()
