"""launch/torchrun.sh, on one node and on two that are both this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workspace import ROOT, prepare_data, reported_losses, run_mapping, write_run


def start(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK")}
    return subprocess.Popen(
        [ROOT / "launch" / "torchrun.sh", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**inherited, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
    )


def test_two_nodes_train_like_one(tmp_path: Path) -> None:
    prepare_data(tmp_path)
    run = write_run(tmp_path / "run.yaml", run_mapping(tmp_path))
    one = start(run, f"checkpoint.directory={tmp_path / 'one'}", NPROC_PER_NODE="2")
    _, errors = one.communicate(timeout=240)
    assert one.returncode == 0, errors
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    nodes = [
        start(
            run,
            f"checkpoint.directory={tmp_path / 'two'}",
            NPROC_PER_NODE="1",
            NNODES="2",
            NODE_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            GLOO_SOCKET_IFNAME="lo",
        )
        for rank in range(2)
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=240)
        assert node.returncode == 0, errors
    assert reported_losses(tmp_path / "one") == reported_losses(tmp_path / "two")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NNODES": "2"}, "need MASTER_ADDR"),
        ({"MASTER_ADDR": "a"}, "set NNODES"),
        ({"NPROC_PER_NODE": "3"}, "multiple of 2"),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(
    environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run.yaml", run_mapping(tmp_path))
    process = start(run, "parallel.tensor_model_parallel_size=2", **environment)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert message in errors
    assert "torch.distributed" not in errors
