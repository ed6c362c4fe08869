"""A rank that dies or stops is named by one message, and all others end; one that hangs is named, and awaited."""

import ast
import contextlib
import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.config import WatchdogConfig
from megatron_ext.errors import DataError
from megatron_ext.runtime import liveness, standings
from megatron_ext.testing.pool import GlooPool
from megatron_ext.training.tasks.pretrain import Pretrain
from tests.robustness.ranks import RANKS, started
from tests.robustness.runs import train_here
from tests.support.waiting import HANGS, wait_until


def join_the_others(rank: int, port: int, errors: Path) -> None:
    """Write to the file `rank` from here on, and meet the other processes."""
    os.dup2(os.open(errors / str(rank), os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    liveness.BEAT, liveness._LOOK = 0.2, 0.1
    store = dist.FileStore(str(errors / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)


def lose_a_rank(rank: int, port: int, errors: Path, lost: int, number: int | None, on_one_host: bool) -> None:
    """Wait for the others, of whom `lost` sends itself a signal that it cannot refuse, or meets a fault of its own."""
    join_the_others(rank, port, errors)
    # Only the one that listens to it may miss it soon: on a busy machine the others are silent for a while too.
    liveness.SILENCE, liveness.OWN_END = 2.0 if (rank + 1) % RANKS == lost else 600.0, 0.5
    if not on_one_host:  # one rank each, which others cannot see
        liveness.SILENCE, liveness.BEAT = 600.0, 0.4  # three of which a rank that lives may miss on a busy machine
        socket.gethostname = lambda: f"node{rank}"
    with liveness.Liveness() as others:
        dist.barrier()
        if rank == lost and number is None:
            raise DataError("a.bin: Stale file handle")
        if rank == lost:
            os.kill(os.getpid(), number)
        try:
            dist.barrier()
        except RuntimeError:
            others.end_if_missing()


def lose_a_rank_and_stay(rank: int, port: int, errors: Path) -> None:
    """As `lose_a_rank`, whose connections stay for a while, as those of a GPU's group do."""
    try:
        lose_a_rank(rank, port, errors, 2, None, on_one_host=False)
    except DataError:
        time.sleep(HANGS)


def be_late(rank: int, port: int, errors: Path) -> None:
    """Five times all others wait for one rank: for longer than their patience, or until they have said so."""
    join_the_others(rank, port, errors)
    standings.PATIENCE = 1.0
    said, seconds = errors / "0", 2.0
    with liveness.Liveness() as others:
        for late, in_step, works, times_said in LATE:
            wait_until(lambda: said.read_text().count("has come") == said.read_text().count(" is late"), said.read_text)
            dist.barrier()
            with others.step() if in_step else contextlib.nullcontext():
                until = time.monotonic() + (seconds if times_said is None else HANGS)
                while rank == late and time.monotonic() < until:
                    if said.read_text().count(" is late") == times_said:
                        break
                    if not works:
                        time.sleep(0.5 if times_said else seconds)
                dist.all_reduce(torch.ones(1))
    dist.barrier()  # as a run does: nobody is gone while another one still looks


def hang(rank: int, port: int, errors: Path, hangs_in_step: bool) -> None:
    """Train at a pace of 0.05 s, until rank 1 does not go on; in its step, or in what it does between two."""
    join_the_others(rank, port, errors)
    limits = WatchdogConfig(minimum_minutes=0.05, first_step_minutes=1.0)
    others = liveness.Liveness(
        limits, errors / "stalls", lambda *said: (errors / f"told {rank}").write_text(repr(said))
    )
    with others:
        for step in range(9):
            hangs = rank == 1 and step == 8
            if hangs and not hangs_in_step:
                time.sleep(HANGS)
            with others.step():
                time.sleep(HANGS if hangs else 0.05)
                dist.barrier()


def train_slowly(path: Path, overrides: list[str]) -> int:
    """Train; rank 1 takes 0.15 s more for each micro-batch."""
    forward = Pretrain.forward

    def late(*arguments: Any) -> Any:
        time.sleep(0.15)
        return forward(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(Pretrain, "forward", late)
        return train_here(path, overrides)


# Rank, whether in a training step, whether it works; how often somebody is named then, None where nobody is.
LATE = [
    (1, True, False, None),  # the first step: other processes may be compiling
    (1, False, True, None),  # it may be saving
    (1, False, False, 1),
    (2, True, True, 2),
    (0, True, False, 3),
]


def said_by_all(errors: Path) -> list[str]:
    """What each rank has said, once it has said anything."""
    return [path.read_text() if (path := errors / str(rank)).exists() else "" for rank in range(RANKS)]


def assert_ends(process: Any, code: int, errors: Path) -> None:
    """Wait for the end of a rank."""
    process.join(HANGS)
    assert process.exitcode == code, said_by_all(errors)


@pytest.mark.parametrize(
    ("lost", "number", "on_one_host", "what"),
    [
        (1, signal.SIGKILL, True, "has ended"),
        (2, signal.SIGSTOP, True, "has not answered"),
        (0, signal.SIGSTOP, True, "has not answered"),
        (1, signal.SIGKILL, False, "has not answered for 1 s"),  # three heartbeats after the collective has failed
    ],
    ids=["killed", "stopped", "rank 0 stopped", "killed on another host"],
)
def test_the_lost_rank_is_named(lost: int, number: int, on_one_host: bool, what: str, tmp_path: Path) -> None:
    with started(lose_a_rank, tmp_path, lost, number, on_one_host) as (ranks, _):
        for rank, process in enumerate(ranks):
            if rank != lost:
                assert_ends(process, 2, tmp_path)
    said = said_by_all(tmp_path)
    [message] = [line for text in said for line in text.splitlines() if line.startswith("error: ")]
    print(message)
    assert f"error: rank {lost} (process {ranks[lost].pid} on " in message
    assert what in message


def test_a_rank_that_ends_by_itself_tells_other_nodes_why(tmp_path: Path) -> None:
    with started(lose_a_rank_and_stay, tmp_path) as (ranks, _):
        for process in ranks[:2]:
            assert_ends(process, 2, tmp_path)
    said = said_by_all(tmp_path)
    print(said[0])
    why = f"error: rank 2 (process {ranks[2].pid} on node2) has ended: a.bin: Stale file handle\n"
    assert said == [why, why, ""]  # it speaks for itself


@pytest.mark.parametrize("in_step", [True, False], ids=["in a step", "between steps"])
def test_a_run_that_no_longer_moves_ends_with_every_ranks_stack(in_step: bool, tmp_path: Path) -> None:
    with started(hang, tmp_path, in_step) as (ranks, _):
        for process in ranks:
            assert_ends(process, 2, tmp_path)
    said = said_by_all(tmp_path)
    [message] = [line for text in said for line in text.splitlines() if line.startswith("error: ")]
    print(message)
    assert "step 9 of this job has not ended within 3 s (the last ones took" in message
    assert f"rank 1 (process {ranks[1].pid} on " in message
    assert "in hang: time.sleep(HANGS" in message
    assert "the others wait. Every rank's stack is in " in message
    [folder] = (tmp_path / "stalls").iterdir()
    stacks = {path.name: path.read_text() for path in folder.iterdir()}
    assert sorted(stacks) == [f"rank_{rank}.txt" for rank in range(RANKS)]
    assert all("in hang" in stack for stack in stacks.values())
    assert "barrier" in stacks["rank_0.txt"]
    kind, text, ends = ast.literal_eval((tmp_path / "told 0").read_text())
    assert (kind, ends) == ("stall", True)
    assert text in message
    assert not (tmp_path / "told 2").exists()


def test_a_late_rank_is_named_and_awaited(tmp_path: Path) -> None:
    with started(be_late, tmp_path) as (ranks, _):
        for process in ranks:
            assert_ends(process, 0, tmp_path)
    said = said_by_all(tmp_path)
    print(said[0])
    named = re.findall(r"rank (\d) \(process (\d+) on .*\) is late: all others have been waiting for it", said[0])
    assert named == [(str(rank), str(ranks[rank].pid)) for rank in (1, 2, 0)]
    assert "in be_late: time.sleep(" in said[0]
    assert said[0].count("has come; the run goes on") >= 2, said[0]
    assert said[1:] == ["", ""]


def test_a_slow_node_is_named_in_the_records(work: Path, pool: GlooPool) -> None:
    directory = work / "slow"
    overrides = [f"checkpoint.directory={directory}", "checkpoint.save_interval=null", "train.train_iters=20"]
    pool.run(2, train_slowly, work / "run.yaml", overrides)
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    [event] = [record for record in records if record.get("event") == "slow_rank"]
    print(event["text"])
    assert event["iteration"] == 20  # not at the first look
    assert event["nodes"] == [socket.gethostname()]
    assert f"node {socket.gethostname()} is slow: its rank 1 of 2 needs up to" in event["text"]
