"""A rank that dies or stops is named by one message, and all others end."""

import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_ext.runtime import liveness
from tests.support import forkserver

RANKS = 3


def lose_a_rank(rank: int, lost: int, number: int, port: int, errors: Path) -> None:
    """Wait for the others, of whom `lost` sends itself a signal that it cannot refuse."""
    os.dup2(os.open(errors / str(rank), os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    liveness.SILENCE, liveness.BEAT, liveness._LOOK = 2.0, 0.2, 0.1
    store = dist.FileStore(str(errors / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    with liveness.Liveness() as others:
        dist.barrier()
        if rank == lost:
            os.kill(os.getpid(), number)
        try:
            dist.barrier()
        except RuntimeError:
            others.end_if_missing()


@pytest.mark.parametrize(
    ("lost", "number", "what"),
    [
        (1, signal.SIGKILL, "has ended"),
        (2, signal.SIGSTOP, "has not answered"),
        (0, signal.SIGSTOP, "has not answered"),
    ],
    ids=["killed", "stopped", "rank 0 stopped"],
)
def test_the_lost_rank_is_named(lost: int, number: int, what: str, tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = forkserver.context()
    ranks = [
        context.Process(target=lose_a_rank, args=(rank, lost, number, store.port, tmp_path)) for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    for rank, process in enumerate(ranks):
        if rank != lost:
            process.join(60)
            assert process.exitcode == 2
    ranks[lost].kill()
    said = [(tmp_path / str(rank)).read_text() for rank in range(RANKS)]
    [message] = [line for text in said for line in text.splitlines() if line.startswith("error: ")]
    print(message)
    assert f"error: rank {lost} (process {ranks[lost].pid} on " in message
    assert what in message
