"""A rank that cannot start ends all of them at once, with one message that names it and says why."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ext import roll_call
from megatron_ext.errors import ConfigError, DataError, EnvironmentFault, MegatronExtError
from megatron_ext.testing.ports import free_port
from tests.support import forkserver
from tests.support.commands import train
from tests.support.waiting import HANGS, wait_until
from tests.support.workspace import ROOT

RANKS = 3
GONE = 0.05
"""Minutes that a rank is waited for which never comes; the others come at once, on a busy machine within them."""
WAYS = ("well", "one", "alike", "a mistake", "gone", "ended")
"""What happens in each of several roll calls of the same ranks."""


def prepare(way: str, rank: int) -> int:
    if way == "alike" or (way == "one" and rank == 1):
        raise ConfigError("train.seed = 'one': must be an integer")
    if way == "a mistake" and rank == 2:
        raise KeyError("layer")
    return rank


def answer_all(rank: int, port: int, connection: Any) -> None:
    """What this rank gets or raises in each way, on a node with rank 1 or alone, and whether it is to say so."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", RANKS), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        os.environ[name] = str(value)
    socket.gethostname = lambda: f"node{rank // 2}"
    said: list[Any] = []
    for way in WAYS:
        if way == "gone" and rank == 2:
            break
        if way == "ended" and rank == 1:  # as its launcher does where it had one
            calls = roll_call._meeting_store(5.0)
            wait_until(lambda: calls.check([f"{way}/0"]))  # noqa: B023 - else rank 1 is the first that is there
            roll_call.tell_of_end("127.0.0.1", port, "", 2, "was killed by SIGKILL")
        try:
            minutes = GONE if way == "gone" else 5.0
            said.append(roll_call.on_every_rank(way, lambda way=way: prepare(way, rank), minutes))  # type: ignore[misc]
        except MegatronExtError as error:
            said.append((type(error), str(error), error.speaks))
        except KeyError as error:
            said.append(repr(error))
    connection.send(said)


def test_every_rank_raises_what_one_has_met_and_one_of_each_node_says_so() -> None:
    port, context, told = free_port(), forkserver.context(), []
    for rank in range(RANKS):
        ours, theirs = context.Pipe()
        context.Process(target=answer_all, args=(rank, port, theirs), daemon=True).start()
        theirs.close()  # one that dies without an answer is the end of the file
        told.append(ours)
    said = [connection.recv() for connection in told]
    fault, first = "train.seed = 'one': must be an integer", (True, False, True)
    for rank, (well, one, alike, mistake, *gone) in enumerate(said):
        assert well == rank
        assert one == (ConfigError, f"rank 1 on node0: {fault}", first[rank])
        assert alike == (ConfigError, fault, first[rank])
        text = "rank 2 on node1: KeyError: 'layer'"
        assert mistake == ("KeyError('layer')" if rank == 2 else (EnvironmentFault, text, first[rank]))
        if rank < 2:
            [(kind, text, _), ended] = gone
            print(text)
            assert kind is EnvironmentFault
            assert f"2 of 3 ranks have come to 127.0.0.1:{port} within {GONE} minutes, not rank 2" in text
            assert ended == (EnvironmentFault, "rank 2 on node0: was killed by SIGKILL", first[rank])


def test_a_fault_of_all_is_said_once_and_those_of_some_by_rank_and_node() -> None:
    def refused(*texts: str | None, looking: int | None = None) -> str:
        answers = [
            roll_call.Answer(rank, f"n{rank // 2}", text and (DataError, text)) for rank, text in enumerate(texts)
        ]
        return str(roll_call.refused(answers, looking or len(texts)))

    assert refused("a", "a", "a") == "a"
    assert refused("a", None, None, looking=1) == "a"
    assert refused("a", "a", None, "b", "a") == "ranks 0 to 1, 4 on n0, n2: a\nrank 3 on n1: b"


def test_what_the_first_rank_finds_wrong_with_the_run_is_said_without_its_name(work: Path) -> None:
    process = train(2, work / "run.yaml", f"checkpoint.directory={work / 'never'}", "data.tokenizer=nowhere")
    assert process.returncode == 2
    assert process.stderr.startswith(f"error: {work / 'run.yaml'}: ")
    assert process.stderr.count("error:") == 1


def test_a_run_with_one_rank_that_was_started_otherwise_ends_with_its_reason(work: Path) -> None:
    process = train(2, work / "run.yaml", f"checkpoint.directory={work / 'never'}", only_last=["optimizer.lrr=1"])
    print(process.stderr)
    assert process.returncode == 2
    assert process.stderr.startswith(
        f"error: rank 1 on {socket.gethostname()}: {work / 'run.yaml'}: 1 problem\n  optimizer.lrr"
    )
    assert process.stderr.count("error:") == 1
    assert not (work / "never").exists()


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("RANK", "WORLD_SIZE", "MASTER_ADDR")])
def test_without_an_address_a_rank_speaks_for_itself(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in names:
        monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "1")
    assert roll_call.on_every_rank("start", lambda: 7) == 7


def test_ctrl_c_that_an_import_has_swallowed_ends_a_rank_that_waits() -> None:
    swallowed = """
import os, signal
from megatron_ext.command import run_command
from megatron_ext.launcher import end_with_launcher
from megatron_ext.roll_call import on_every_rank

def main():
    end_with_launcher()
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        pass
    on_every_rank("configuration", lambda: None)

run_command(main)
"""
    rank = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = subprocess.run(
        [sys.executable, "-c", swallowed],
        cwd=ROOT,
        env={**os.environ, **rank, "TORCHELASTIC_RUN_ID": "none"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert (process.returncode, process.stderr) == (130, "interrupted\n")
