"""A real Slurm of two nodes: launch/slurm.sbatch trains as one process; one of tools/launch.py queues itself again."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint.find import checkpoint_name
from megatron_ext.config import dump_yaml
from megatron_ext.locks import exclusive
from megatron_ext.monitoring.metrics_file import read_history, read_metrics
from megatron_ext.testing.ports import free_port
from tests.slurm.cluster import Cluster, unavailable
from tests.support.commands import TOOLS, command, train
from tests.support.waiting import HANGS, Holds, wait_until
from tests.support.webhook_server import WebhookServer
from tests.support.workspace import ROOT, prepare_data, reported_losses, run_mapping, write_run

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(unavailable() is not None, reason=f"no Slurm: {unavailable()}")]


def submit(cluster: Cluster, directory: Path, *arguments: str | Path, **environment: str) -> str:
    """Queue a run on both nodes and return the job's number."""
    return cluster.run(
        "sbatch",
        "--parsable",
        "--gpus-per-node=0",
        "--cpus-per-task=2",
        f"--output={directory}/job-%j.out",
        f"--chdir={directory}",
        str(ROOT / "launch" / "slurm.sbatch"),
        *map(str, arguments),
        # Both "nodes" are this machine: their names lead nowhere, and Gloo must stay on loopback.
        **{
            "MEGATRON_EXT_ROOT": str(ROOT),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "GLOO_SOCKET_IFNAME": "lo",
            "NPROC_PER_NODE": "2",
            "PYTHON": sys.executable,
            **environment,
        },
    ).strip()


LAYOUT = [
    "parallel.tensor_model_parallel_size=2",
    "parallel.sequence_parallel=true",
    "parallel.expert_model_parallel_size=2",
    "parallel.expert_tensor_parallel_size=1",
]
PROFILE: dict[str, Any] = {
    "scheduler": "slurm",
    "gpus_per_node": 0,
    "processes_per_node": 2,
    "directives": ["--cpus-per-task=2"],
    "environment": [
        {"name": "MASTER_ADDR", "value": "127.0.0.1", "why": "both nodes are this machine, their names lead nowhere"},
        {"name": "GLOO_SOCKET_IFNAME", "value": "lo", "why": "the same"},
    ],
    "overrides": [*LAYOUT, "checkpoint.save_interval=1", "checkpoint.keep_last=2"],
}


def losses_differ(directory: Path, alone: Path) -> float:
    """The largest relative difference of two runs' losses."""
    measured, expected = reported_losses(directory), reported_losses(alone)
    return max(abs(m - e) / e for m, e in zip(measured, expected, strict=True))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twenty steps, and the same trained by one process."""
    directory = tmp_path_factory.mktemp("slurm-runs")
    prepare_data(directory)
    mapping = run_mapping(directory, moe=True)
    mapping["train"] |= {"train_iters": 20}
    mapping["checkpoint"] |= {"save_interval": 10}
    run = write_run(directory / "run.yaml", mapping)
    alone = train(1, run, f"checkpoint.directory={directory / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    return directory


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as daemons:
        yield daemons


def test_two_nodes_train_like_one_process(work: Path, cluster: Cluster) -> None:
    job = submit(cluster, work, work / "run.yaml", f"checkpoint.directory={work / 'cluster'}", *LAYOUT)
    state = cluster.wait_for_job(job)
    output = (work / f"job-{job}.out").read_text()
    assert state == "COMPLETED", f"{state}\n{output}"
    assert f"job {job} on 2 nodes" in output
    difference = losses_differ(work / "cluster", work / "alone")
    print(f"2 nodes x 2 processes against one process: largest relative difference of the loss {difference:.1e}")
    assert difference < 1e-5  # fp32 rounding, as in the parity grid


def step(cluster: Cluster, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Train with one process on each node, which srun starts without torchrun."""
    return subprocess.run(
        [
            "srun",
            "--nodes=2",
            "--ntasks-per-node=1",
            "--cpus-per-task=1",
            sys.executable,
            TOOLS / "train.py",
            *arguments,
        ],
        env={**cluster.environment, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )


def test_what_srun_starts_without_torchrun_trains_as_one_run_or_is_refused(work: Path, cluster: Cluster) -> None:
    directory = work / "srun"
    call = [work / "run.yaml", f"checkpoint.directory={directory}", "train.stop_at_iteration=2"]
    refused = step(cluster, *call)
    print(refused.stderr)
    assert refused.returncode == 2
    said = "error: srun started 2 processes (SLURM_STEP_NUM_TASKS = 2), but MASTER_ADDR, MASTER_PORT not set"
    assert refused.stderr.count(said) == 2  # on each node
    assert "Traceback" not in refused.stderr
    assert not directory.exists()
    trained = step(cluster, *call, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    assert trained.returncode == 0, trained.stderr
    assert [start["world_size"] for start in read_history(directory / "metrics.jsonl").starts] == [2]
    assert reported_losses(directory) == pytest.approx(reported_losses(work / "alone")[:2], rel=1e-5)


def test_people_get_one_alert_of_a_job_that_is_refused(work: Path, cluster: Cluster) -> None:
    directory, server = work / "held", WebhookServer()
    directory.mkdir()
    (directory / "metrics.jsonl").write_text('{"event": "start", "iteration": 0}\n')
    alerts = "alerts={webhook: {url_variable: HOOK}}"
    with exclusive(directory, "testing"):
        call = [work / "run.yaml", f"checkpoint.directory={directory}", alerts]
        job = submit(cluster, work, *call, HOOK=server.url, NPROC_PER_NODE="1")
        state = cluster.wait_for_job(job)
    server.close()
    output = (work / f"job-{job}.out").read_text()
    assert state == "FAILED", output
    [text] = server.texts
    assert "is being written by testing" in text
    assert "is being written by testing" in output


def test_a_job_that_is_stopped_is_queued_again_and_ends_as_the_undisturbed_run(work: Path, cluster: Cluster) -> None:
    directory, held = work / "requeued", f"{checkpoint_name(12)}.partial"
    holds = Holds(work / "holds", held)  # where the run waits for the signal: it may be at its end otherwise
    variables = holds.environment | {"MASTER_PORT": str(free_port())}
    environment = [{"name": name, "value": value, "why": "for this test"} for name, value in variables.items()]
    profile = {**PROFILE, "environment": [*PROFILE["environment"], *environment]}
    (work / "profile.yaml").write_text(dump_yaml(profile))
    launched = command(
        TOOLS / "launch.py",
        work / "run.yaml",
        f"checkpoint.directory={directory}",
        *("--nodes", "2", "--profile", work / "profile.yaml", "--time", "1:00:00", "--submit"),
        SLURM_CONF=cluster.environment["SLURM_CONF"],
    )
    assert launched.returncode == 0, launched.stderr
    print(launched.stdout)
    job = launched.stdout.split("Submitted batch job ")[1].split()[0]
    metrics, logs = directory / "metrics.jsonl", work / "requeued-logs"
    files = logs / f"requeued-{job}.out", logs / f"requeued-{job}" / "node-0.log"

    def said() -> list[str]:
        return [path.read_text() if path.exists() else "" for path in files]

    wait_until(lambda: metrics.is_file() and len(read_metrics(metrics)) > 1, said)
    cluster.run("scancel", "--signal=TERM", job)  # what the file's --signal has Slurm do
    wait_until(lambda: "SIGTERM: finishing the step" in said()[1], said)
    holds.release(held)
    state = cluster.wait_for_job(job)
    output, node = said()
    assert state == "COMPLETED", f"{state}\n{output}{node}"
    assert "stopped and saved (exit code 143): queued again to go on" in output
    assert [int(start) for start in re.findall(rf"job {job}, start (\d)", output)] == [1, 2]
    assert node.count("fit to train: 4 ranks, on ") == 2, "the nodes were not tested before each start"
    assert "SIGTERM: finishing the step" in node
    assert f"continuing {directory}" in node
    assert "Traceback" not in node
    assert losses_differ(directory, work / "alone") < 1e-5
