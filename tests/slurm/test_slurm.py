"""launch/slurm.sbatch, tried for real: a job on two nodes trains to the loss of one process."""

import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, unavailable
from tests.workspace import prepare_data, reported_losses, run_mapping, train, write_run

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(unavailable() is not None, reason=f"no Slurm: {unavailable()}")]


def test_two_nodes_train_like_one_process(tmp_path: Path, repository: Path) -> None:
    prepare_data(tmp_path)
    run = write_run(tmp_path / "run.yaml", run_mapping(tmp_path, moe=True))
    alone = train(1, run, f"checkpoint.directory={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    (tmp_path / "slurm").mkdir()
    with Cluster(tmp_path / "slurm") as cluster:
        job = cluster.run(
            "sbatch",
            "--parsable",
            "--gpus-per-node=0",
            "--cpus-per-task=2",
            f"--output={tmp_path / 'job.out'}",
            f"--chdir={tmp_path}",
            str(repository / "launch" / "slurm.sbatch"),
            str(run),
            f"checkpoint.directory={tmp_path / 'cluster'}",
            "parallel.tensor_model_parallel_size=2",
            "parallel.sequence_parallel=true",
            "parallel.expert_model_parallel_size=2",
            "parallel.expert_tensor_parallel_size=1",
            # Both "nodes" are this machine: their names lead nowhere, and Gloo must stay on loopback.
            MEGATRON_EXT_ROOT=str(repository),
            MASTER_ADDR="127.0.0.1",
            GLOO_SOCKET_IFNAME="lo",
            NPROC_PER_NODE="2",
            PYTHON=sys.executable,
        ).strip()
        state = cluster.wait_for_job(job, 240)
    output = (tmp_path / "job.out").read_text()
    assert state == "COMPLETED", output
    assert f"job {job} on 2 nodes" in output
    measured, expected = reported_losses(tmp_path / "cluster"), reported_losses(tmp_path / "alone")
    difference = max(abs(m - e) / e for m, e in zip(measured, expected, strict=True))
    print(f"2 nodes x 2 processes against one process: largest relative difference of the loss {difference:.1e}")
    assert difference < 1e-5  # fp32 rounding, as in the parity grid
