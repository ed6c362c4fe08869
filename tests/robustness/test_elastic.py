"""Under torchrun's elastic launch a lost rank and a lost node cost a restart each, and the run ends as undisturbed."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_ext.monitoring.metrics_file import read_metrics, read_starts
from megatron_ext.testing.pool import GlooPool
from tests.robustness.runs import train_here, wait_until
from tests.support.workspace import ROOT, reported_losses

STEPS = 40
QUICK = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=2"


def node(work: Path, options: list[str], port: int) -> subprocess.Popen[str]:
    """The launcher of one of at most two nodes, both this machine."""
    cluster = {"NNODES": "1:2", "NPROC_PER_NODE": "1", "MAX_RESTARTS": "3", "MASTER_ADDR": "127.0.0.1"}
    here = {"LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "RDZV_CONF": QUICK, "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [ROOT / "launch" / "torchrun.sh", work / "run.yaml", *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **cluster, **here},
    )


def rank_of(launcher: subprocess.Popen[str]) -> psutil.Process:
    """The process that trains on a node."""
    wait_until(lambda: psutil.Process(launcher.pid).children())
    return psutil.Process(launcher.pid).children()[-1]


def test_a_lost_rank_and_a_lost_node_cost_a_restart_each(work: Path, pool: GlooPool) -> None:
    directory, alone = work / "elastic", work / "undisturbed_elastic"
    usual = [f"train.train_iters={STEPS}", "checkpoint.keep_last=2"]
    pool.run(
        1, train_here, work / "run.yaml", [*usual, "checkpoint.save_interval=null", f"checkpoint.directory={alone}"]
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [*usual, "checkpoint.save_interval=1", f"checkpoint.directory={directory}"]
    metrics = directory / "metrics.jsonl"

    def steps() -> int:
        return read_metrics(metrics)[-1]["iteration"] if metrics.is_file() and read_metrics(metrics) else 0

    def starts() -> list[int]:
        return [start["world_size"] for start in read_starts(metrics)] if metrics.is_file() else []

    first, second = node(work, options, port), node(work, options, port)
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
