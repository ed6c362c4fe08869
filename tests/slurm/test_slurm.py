"""launch/slurm.sbatch, tried for real: a job on two nodes trains to the loss of one process, and saves at its end."""

import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, unavailable
from tests.support.commands import train
from tests.support.workspace import ROOT, prepare_data, reported_losses, run_mapping, write_run

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(unavailable() is not None, reason=f"no Slurm: {unavailable()}")]


def submit(cluster: Cluster, directory: Path, *arguments: str | Path) -> str:
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
        MEGATRON_EXT_ROOT=str(ROOT),
        MASTER_ADDR="127.0.0.1",
        GLOO_SOCKET_IFNAME="lo",
        NPROC_PER_NODE="2",
        PYTHON=sys.executable,
    ).strip()


def test_two_nodes_train_like_one_process_and_save_when_their_time_is_over(tmp_path: Path) -> None:
    prepare_data(tmp_path)
    run = write_run(tmp_path / "run.yaml", run_mapping(tmp_path, moe=True))
    alone = train(1, run, f"checkpoint.directory={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    (tmp_path / "slurm").mkdir()
    layout = [
        "parallel.tensor_model_parallel_size=2",
        "parallel.sequence_parallel=true",
        "parallel.expert_model_parallel_size=2",
        "parallel.expert_tensor_parallel_size=1",
    ]
    with Cluster(tmp_path / "slurm") as cluster:
        job = submit(cluster, tmp_path, run, f"checkpoint.directory={tmp_path / 'cluster'}", *layout)
        state = cluster.wait_for_job(job, 240)
        long = ["train.train_iters=100000", "checkpoint.save_interval=100000"]
        warned = submit(cluster, tmp_path, run, f"checkpoint.directory={tmp_path / 'warned'}", *long, *layout)
        reported = tmp_path / "warned" / "metrics.jsonl"
        cluster.wait_until(lambda: reported.is_file() and reported.read_text().count('"loss"') > 2, 240)
        cluster.run("scancel", "--signal=TERM", warned)  # what --signal=TERM@300 has Slurm do
        cluster.wait_for_job(warned, 120)
    ended = (tmp_path / f"job-{warned}.out").read_text()
    (saved,) = (tmp_path / "warned").glob("iter_*")
    assert "SIGTERM: finishing the step" in ended
    assert f"saved {saved}" in ended
    assert "Traceback" not in ended
    output = (tmp_path / f"job-{job}.out").read_text()
    assert state == "COMPLETED", output
    assert f"job {job} on 2 nodes" in output
    measured, expected = reported_losses(tmp_path / "cluster"), reported_losses(tmp_path / "alone")
    difference = max(abs(m - e) / e for m, e in zip(measured, expected, strict=True))
    print(f"2 nodes x 2 processes against one process: largest relative difference of the loss {difference:.1e}")
    assert difference < 1e-5  # fp32 rounding, as in the parity grid
