"""Until the ranks have their process group: one that dies or is stopped is named, one that is slow is awaited."""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest

from megatron_ext import roll_call
from megatron_ext.command import run_command
from megatron_ext.locks import exclusive
from megatron_ext.runtime import liveness
from megatron_ext.training import loop
from tests.robustness.ranks import RANKS, started
from tests.support.commands import TOOLS, command
from tests.support.waiting import HANGS
from tests.support.webhook_server import WebhookServer
from tests.support.workspace import reported_losses
from tools import preflight, train

RUN_ID = "starts"
LOADS, MEETS = "setup_logging", "start_process_group"
"""What a rank is about to call in `training.loop`: before its second roll call, and after its last one."""


def be_a_rank(
    rank: int, port: int, errors: Path, call: list[str], prepare: Callable[[int], None], hook: str = ""
) -> None:
    """Start as the rank of a launcher that keeps the store, once `prepare` has changed what this rank does.

    Args:
        hook: where alerts go.
    """
    os.dup2(os.open(errors / str(rank), os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"HOOK": hook, "TORCHELASTIC_RUN_ID": RUN_ID, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    liveness.BEAT, liveness._LOOK = 0.2, 0.1
    sys.argv = list(call)
    prepare(rank)
    run_command(preflight.main if call[0] == "preflight" else train.main)


class Struck:
    """Rank 1 sends itself a signal when it is about to call a function; others are on its host or each on its own."""

    def __init__(self, moment: str, number: int, *, on_one_host: bool = True) -> None:
        self._moment, self._number, self._on_one_host = moment, number, on_one_host

    def __call__(self, rank: int) -> None:
        liveness.SILENCE = 3.0 if self._number == signal.SIGSTOP else 600.0
        if not self._on_one_host:
            socket.gethostname = lambda: f"node{rank}"
            os.environ["LOCAL_RANK"] = "0"
        if rank == 1:
            replace(self._moment, lambda *_, **__: os.kill(os.getpid(), self._number))


def replace(name: str, function: Callable[..., Any]) -> None:
    """Have training and the test of nodes call something else."""
    from megatron_ext.runtime import logs, process_groups

    for module in (loop, logs, process_groups):
        if hasattr(module, name):
            setattr(module, name, function)


def load_slowly(rank: int) -> None:
    """Rank 1 holds all its threads up, for longer than a rank may be silent, as what loads a library does."""
    liveness.SILENCE, met, setup = 1.0, liveness.Liveness.met, loop.setup_logging

    def patient(others: liveness.Liveness) -> None:
        liveness.SILENCE = 600.0
        met(others)

    def slow(*arguments: Any) -> None:
        ctypes.PyDLL(None).usleep(4_000_000)  # with Python's lock
        setup(*arguments)

    liveness.Liveness.met = patient  # type: ignore[method-assign]
    if rank == 1:
        loop.setup_logging = slow


def other_code(rank: int) -> None:
    """Rank 2 has another torch."""
    if rank == 2:
        loop.installation = lambda: {"torch": "1.0"}


def other_rate(rank: int) -> None:
    """Rank 2 has another learning rate."""
    if rank == 2:
        sys.argv.append("optimizer.lr=0.5")


def nothing(rank: int) -> None:
    """All ranks start as they are."""


def said_by(ranks: list[Any], errors: Path, lost: int | None = None, *, by_all: bool = False) -> list[str]:
    """The errors that ranks print, of whom one ends with exit code 2 and a launcher then ends the others.

    Args:
        lost: a rank that does not count.
        by_all: each has a launcher of its own, so that nobody ends it.
    """
    others = [process for rank, process in enumerate(ranks) if rank != lost]
    first = wait([process.sentinel for process in others], HANGS)
    assert first
    for process in others:
        if by_all:
            process.join(HANGS)
        if by_all or process.sentinel in first:
            assert process.exitcode == 2
    for process in ranks:
        process.kill()
    lines = [line for rank in range(RANKS) for line in (errors / str(rank)).read_text().splitlines()]
    return [line for line in lines if line.startswith("error: ")]


def call_of(tool: str, work: Path, directory: Path, *options: str) -> list[str]:
    """The command line of a run whose batch so many ranks can share."""
    return [tool, str(work / "run.yaml"), f"checkpoint.directory={directory}", "train.global_batch_size=6", *options]


@pytest.mark.parametrize(
    ("tool", "moment", "number", "what"),
    [
        ("train", LOADS, signal.SIGKILL, "has ended, without which the others cannot go on"),
        ("train", MEETS, signal.SIGSTOP, "has not answered for 3 s, without which the others cannot go on"),
        ("preflight", MEETS, signal.SIGKILL, "has ended, without which the others cannot go on"),
    ],
    ids=["killed while it loads", "stopped before it meets the others", "killed in the test of nodes"],
)
def test_a_rank_that_is_lost_before_all_have_met_is_named(
    tool: str, moment: str, number: int, what: str, work: Path, tmp_path: Path
) -> None:
    call = call_of(tool, work, tmp_path / "run")
    with started(be_a_rank, tmp_path, call, Struck(moment, number)) as (ranks, _):
        [message] = said_by(ranks, tmp_path, lost=1)
    print(message)
    assert message.startswith(f"error: rank 1 (process {ranks[1].pid} on {socket.gethostname()}) {what}")


def test_one_of_another_host_is_named_once_its_launcher_has_said_so(work: Path, tmp_path: Path) -> None:
    struck = Struck(MEETS, signal.SIGKILL, on_one_host=False)
    with started(be_a_rank, tmp_path, call_of("train", work, tmp_path / "run"), struck) as (ranks, port):
        ranks[1].join(HANGS)
        begun = time.monotonic()
        roll_call.tell_of_end("127.0.0.1", port, RUN_ID, 1, "was killed by SIGKILL")
        messages = said_by(ranks, tmp_path, lost=1, by_all=True)
    print(f"{messages[0]}, {time.monotonic() - begun:.1f} s after its launcher has said so")
    why = f"error: rank 1 (process {ranks[1].pid} on node1) has ended: it was killed by SIGKILL"
    assert messages == [why, why]  # once on each node


def test_a_rank_that_loads_for_long_is_awaited(work: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    call = call_of("train", work, directory, "train.train_iters=2", "checkpoint.save_interval=null")
    with started(be_a_rank, tmp_path, call, load_slowly) as (ranks, _):
        for process in ranks:
            process.join(HANGS)
            assert process.exitcode == 0, (tmp_path / "1").read_text()
    assert len(reported_losses(directory)) == 2


@pytest.fixture(scope="module")
def trained(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that has been trained for a while."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    process = command(TOOLS / "train.py", *call_of("", work, directory, "train.stop_at_iteration=2")[1:])
    assert process.returncode == 0, process.stderr
    return directory


@pytest.mark.parametrize(
    ("tool", "options", "prepare", "reason"),
    [
        ("train", [], other_code, "the ranks do not run the same code"),
        ("train", ["model.hidden_size=32"], nothing, "hidden_size"),
        ("train", [], None, "is being written by testing"),
        ("preflight", [], other_rate, "the ranks were not started with the same configuration"),
    ],
    ids=["another code", "another run", "a lock that is held", "another run in the test of nodes"],
)
def test_people_get_one_alert_of_a_restart_that_is_refused(
    tool: str,
    options: list[str],
    prepare: Callable[[int], None] | None,
    reason: str,
    work: Path,
    trained: Path,
    tmp_path: Path,
) -> None:
    server = WebhookServer()
    call = call_of(tool, work, trained, "alerts={webhook: {url_variable: HOOK}}", *options)
    held = exclusive(trained, "testing") if prepare is None else contextlib.nullcontext()
    with held, started(be_a_rank, tmp_path, call, prepare or nothing, server.url) as (ranks, _):
        [message] = said_by(ranks, tmp_path)
    server.close()
    [text] = server.texts
    print(f"{message}\n{text}")
    assert "failed before its first step" in text
    assert reason in text
