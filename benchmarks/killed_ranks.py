"""Ranks that are forked from one process which has imported everything, and killed at a moment that was drawn."""

import atexit
import functools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from run_data import ROOT

from megatron_ext.testing.ports import free_port

ANYWHERE = "at any time"
ONCE = ("asking the reference", "writing the reference")
"""Places that only the first start comes to."""
PATIENCE = 900.0
"""Seconds that a start may take."""


def places() -> dict[str, list[tuple[Any, str]]]:
    """What a rank does at the moments it may be killed at: the functions that do it, by owner and name."""
    from megatron_ext.checkpoint.copier import Copier
    from megatron_ext.checkpoint.manager import CheckpointManager
    from megatron_ext.checkpoint.save import Save
    from megatron_ext.monitoring.monitor import Monitor
    from megatron_ext.training import loop, reference
    from megatron_ext.training.session import Session

    return {
        "while it starts": [(loop, name) for name in ("prepare_directory", "open_data", "build_hooks", "open_session")],
        "asking the reference": [(reference.StoredReference, "_compute")],
        "writing the reference": [(reference, "_write")],
        "taking up a checkpoint": [(CheckpointManager, "restore")],
        "in validation": [(Session, "validate")],
        "in a report": [(Monitor, name) for name in ("step", "validation", "event")],
        "saving its shards": [(Save, "begin"), (Save, "_write")],
        "completing a checkpoint": [(Save, "_complete")],
        "copying a checkpoint": [(Copier, "_copy")],
    }


@dataclass(frozen=True)
class Moment:
    """When a rank is killed."""

    rank: int
    place: str
    at: float
    """Number of the call at this place; or seconds."""


class Calls:
    """Counts the calls that Python makes at each place, on every thread, and kills this process before one of them."""

    def __init__(self, moment: Moment | None) -> None:
        self._moment = moment
        self.counts: Counter[str] = Counter()
        if moment is not None and moment.place == ANYWHERE:
            timer = threading.Timer(moment.at, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        for place, functions in places().items():
            for owner, name in functions:
                setattr(owner, name, self._counting(place, getattr(owner, name)))

    def _counting(self, place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, inside which the calls count as those of `place`."""

        def count(frame: FrameType, event: str, _: Any) -> None:
            if event in ("call", "c_call"):
                self.counts[place] += 1
                if self._moment is not None and (place, self.counts[place]) == (self._moment.place, self._moment.at):
                    os.kill(os.getpid(), signal.SIGKILL)

        @functools.wraps(function)
        def inside(*positional: Any, **named: Any) -> Any:
            before = sys.getprofile()
            sys.setprofile(count)
            try:
                return function(*positional, **named)
            finally:
                sys.setprofile(before)

        return inside


def be_a_rank(rank: int, size: int, port: int, call: list[str], log: Path, moment: Moment | None) -> None:
    """A process that trains as one started by a launcher does."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    sys.path.insert(0, str(ROOT))
    from megatron_ext.command import run_command
    from tools import train

    calls = Calls(moment if moment is not None and moment.rank == rank else None)
    sys.argv = ["train.py", *call]
    code: Any = 1
    try:
        run_command(train.main)
    except SystemExit as ended:
        code = ended.code
    log.with_name(f"calls.{rank}.json").write_text(json.dumps(calls.counts))
    # As a Python of its own ends; a forked one would leave this out, and wait for W&B's threads.
    atexit._run_exitfuncs()
    os._exit(code)


@dataclass
class Fork:
    """Starts ranks from one process that has imported what they need."""

    context: Any = field(default_factory=lambda: multiprocessing.get_context("forkserver"))

    def __post_init__(self) -> None:
        self.context.set_forkserver_preload(["megatron_ext.testing.preload", "wandb", "tensorboardX"])

    def train(self, size: int, call: list[str], log: Path, moment: Moment | None = None, grace: float = 0) -> bool:
        """One start with so many ranks; whether it was killed. SystemExit where it ended otherwise than it may."""
        port = free_port()
        ranks = [
            self.context.Process(target=be_a_rank, args=(rank, size, port, call, log, moment)) for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        try:
            killed = self._watch(ranks, grace)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        codes = [rank.exitcode for rank in ranks]
        if not killed and any(codes):
            raise SystemExit(f"{' '.join(call)}: the ranks ended with {codes}, though none was killed; see {log}")
        return killed

    def _watch(self, ranks: list[Any], grace: float) -> bool:
        """Wait until one is killed and the others have ended or had their grace, or all have ended."""
        deadline, killed = time.monotonic() + PATIENCE, False
        while any(rank.exitcode is None for rank in ranks) and time.monotonic() < deadline:
            if not killed and any(rank.exitcode == -signal.SIGKILL for rank in ranks):
                killed, deadline = True, time.monotonic() + grace
            elif not killed and any(rank.exitcode for rank in ranks):
                deadline = min(deadline, time.monotonic() + 5)
            time.sleep(0.01)
        if not killed and any(rank.exitcode is None for rank in ranks):
            raise SystemExit(f"the ranks hang: {[rank.exitcode for rank in ranks]}")
        return killed or any(rank.exitcode == -signal.SIGKILL for rank in ranks)
