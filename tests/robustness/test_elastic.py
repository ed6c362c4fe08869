"""Under torchrun's elastic launch a lost rank and a lost node cost a restart each, and the run ends as undisturbed."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from megatron_ext.checkpoint.find import checkpoint_name
from megatron_ext.monitoring.metrics_file import read_history, read_metrics
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.ports import free_port
from tests.robustness.runs import train_here
from tests.support.commands import TOOLS
from tests.support.waiting import HANGS, Holds, ended_at_last, ranks_of, wait_until
from tests.support.workspace import reported_losses

STEPS = 40
QUICK = "last_call_timeout=5,keep_alive_interval=2,keep_alive_max_attempt=4"


def node(
    work: Path, errors: Path, options: list[str], port: int, environment: Mapping[str, str], *, is_host: bool
) -> subprocess.Popen[bytes]:
    """The launcher of one of at most two nodes, both this machine, with the options of launch/torchrun.sh.

    Args:
        is_host: it is that of MASTER_ADDR, without which the others cannot meet again.
    """
    elastic = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    meeting = [
        "--rdzv-endpoint",
        f"127.0.0.1:{port}",
        "--rdzv-id",
        f"127.0.0.1:{port}",
        "--rdzv-conf",
        f"{QUICK},is_host={is_host}",
    ]
    usual = {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with errors.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_ext.runtime.launch", *elastic, *meeting, "--local-addr", "127.0.0.1"]
            + [str(TOOLS / "train.py"), str(work / "run.yaml"), *options],
            stderr=file,
            stdout=subprocess.DEVNULL,
            env={**usual, **environment},
        )


def test_a_lost_rank_and_a_lost_node_cost_a_restart_each(work: Path, pool: GlooPool, tmp_path: Path) -> None:
    directory, alone = work / "elastic", work / "undisturbed_elastic"
    usual = [f"train.train_iters={STEPS}", "checkpoint.keep_last=2"]
    pool.run(
        1, train_here, work / "run.yaml", [*usual, "checkpoint.save_interval=null", f"checkpoint.directory={alone}"]
    )
    port = free_port()
    options = [*usual, "checkpoint.save_interval=1", f"checkpoint.directory={directory}"]
    metrics = directory / "metrics.jsonl"

    def starts() -> list[int]:
        return [start["world_size"] for start in read_history(metrics).starts] if metrics.is_file() else []

    def train_together(times: int) -> bool:
        """Whether both nodes have come to a step of a start, for the so many-th time."""
        if starts().count(2) < times or starts()[-1] != 2:
            return False
        steps = read_metrics(metrics)
        return bool(steps) and steps[-1]["iteration"] > read_history(metrics).starts[-1]["iteration"]

    # The run waits for either loss, on the node that is lost: it may be at its end otherwise.
    waits = [f"{checkpoint_name(step)}.partial" for step in (STEPS // 3, STEPS * 2 // 3)]
    holds, said = Holds(tmp_path / "holds", *waits), (tmp_path / "first", tmp_path / "second")
    first = node(work, said[0], options, port, {}, is_host=True)
    second = node(work, said[1], options, port, holds.environment, is_host=False)
    with ended_at_last(first), ended_at_last(second):  # their ranks end with them
        wait_until(lambda: train_together(1), lambda: [path.read_text() for path in said], first)
        [rank] = ranks_of(second).values()
        rank.kill()
        holds.release(waits[0])
        wait_until(lambda: train_together(2), lambda: [path.read_text() for path in said], first)
        launcher = psutil.Process(second.pid)
        launcher.suspend()  # the node is gone, and nobody says so
        for process in (*ranks_of(second).values(), launcher):
            process.kill()
        first.wait(HANGS)
    errors = said[0].read_text()
    print(errors)
    assert first.returncode == 0, errors
    print(f"ranks at each start: {starts()}")
    assert starts()[-1] == 1
    assert starts().count(2) >= 2
    assert "Traceback" not in errors
    assert " has ended, without which the others cannot go on" in errors
    measured, expected = reported_losses(directory), reported_losses(alone)
    assert measured == pytest.approx(expected, rel=1e-6)
    assert len(measured) == STEPS
