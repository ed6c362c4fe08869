"""Under torchrun's elastic launch a lost rank and a lost node cost a restart each, and the run ends as undisturbed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_ext.monitoring.metrics_file import read_history, read_metrics
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.ports import free_port
from tests.robustness.runs import train_here, wait_until
from tests.support.commands import TOOLS
from tests.support.workspace import reported_losses

STEPS = 40
QUICK = "last_call_timeout=5,keep_alive_interval=2,keep_alive_max_attempt=4"


def node(work: Path, options: list[str], port: int, *, is_host: bool) -> subprocess.Popen[str]:
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
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_ext.runtime.launch", *elastic, *meeting, "--local-addr", "127.0.0.1"]
        + [str(TOOLS / "train.py"), str(work / "run.yaml"), *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


def rank_of(launcher: subprocess.Popen[str]) -> psutil.Process:
    """The process that trains on a node."""
    wait_until(lambda: psutil.Process(launcher.pid).children())
    return psutil.Process(launcher.pid).children()[-1]


def test_a_lost_rank_and_a_lost_node_cost_a_restart_each(
    work: Path, pool: GlooPool, request: pytest.FixtureRequest
) -> None:
    directory, alone = work / "elastic", work / "undisturbed_elastic"
    usual = [f"train.train_iters={STEPS}", "checkpoint.keep_last=2"]
    pool.run(
        1, train_here, work / "run.yaml", [*usual, "checkpoint.save_interval=null", f"checkpoint.directory={alone}"]
    )
    port = free_port()
    options = [*usual, "checkpoint.save_interval=1", f"checkpoint.directory={directory}"]
    metrics = directory / "metrics.jsonl"

    def steps() -> int:
        return read_metrics(metrics)[-1]["iteration"] if metrics.is_file() and read_metrics(metrics) else 0

    def starts() -> list[int]:
        return [start["world_size"] for start in read_history(metrics).starts] if metrics.is_file() else []

    first, second = (node(work, options, port, is_host=is_host) for is_host in (True, False))
    request.addfinalizer(lambda: [launcher.kill() for launcher in (first, second)])  # their ranks end with them
    wait_until(lambda: 2 in starts())
    at = steps()
    wait_until(lambda: steps() > at)
    rank_of(second).kill()
    before = len(starts())
    wait_until(lambda: len(starts()) > before)
    at = steps()
    wait_until(lambda: steps() > at)
    for process in (rank_of(second), psutil.Process(second.pid)):  # the node is gone, and nobody says so
        process.send_signal(signal.SIGKILL)
    second.communicate()
    _, errors = first.communicate(timeout=240)
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
