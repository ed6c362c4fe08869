"""Whoever started the processes: they train together or are refused, never each alone without knowing."""

import os
import signal
import subprocess
import sys

import pytest

from megatron_ext.errors import EnvironmentFault
from megatron_ext.launcher import LAUNCHER, launched_rank, launched_world_size, name_launcher
from tests.support.workspace import ROOT

OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
HYDRA = {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MVAPICH = {"MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_LOCAL_RANK": "1"}
MASTER = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment of its own for each test, without anything of a launcher."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "OMPI_", "PMI", "MPI_", "MV2_", "MASTER_"))
        and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    monkeypatch.setattr(os, "environ", kept)


@pytest.mark.parametrize("variables", [OPEN_MPI, SRUN, HYDRA, MVAPICH], ids=["Open MPI", "srun", "Hydra", "MVAPICH"])
def test_all_that_is_needed_is_read(variables: dict[str, str]) -> None:
    os.environ |= variables | MASTER
    assert (launched_world_size(), launched_rank()) == (4, 3)
    assert os.environ["LOCAL_RANK"] == "1"
    # mpirun within a job of Slurm was itself started by srun, one process a node.
    os.environ |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    assert (launched_world_size(), launched_rank()) == (4, 3)


@pytest.mark.parametrize("variables", [OPEN_MPI, SRUN, HYDRA, MVAPICH], ids=["Open MPI", "srun", "Hydra", "MVAPICH"])
@pytest.mark.parametrize("lost", ["MASTER_ADDR", "MASTER_PORT", "rank", "local rank"])
def test_what_is_missing_is_named_with_the_way_out(variables: dict[str, str], lost: str) -> None:
    names = {"rank": list(variables)[1], "local rank": list(variables)[2]}
    os.environ |= {name: value for name, value in (variables | MASTER).items() if name != names.get(lost, lost)}
    with pytest.raises(EnvironmentFault, match=f"started 4 processes .*{names.get(lost, lost)} not set") as refusal:
        launched_world_size()
    for way in ("torchrun", "launch/slurm.sbatch", f"unset {next(iter(variables))}"):
        assert way in str(refusal.value)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
    ids=["nothing", "shell by srun --pty", "batch script or salloc", "mpirun -n 1"],
)
def test_one_process_trains_alone(variables: dict[str, str]) -> None:
    os.environ |= variables
    assert (launched_world_size(), launched_rank()) == (1, 0)
    assert "RANK" not in os.environ


def test_torchrun_is_believed_wherever_it_runs() -> None:
    os.environ |= SRUN | {"RANK": "5", "WORLD_SIZE": "8"}
    assert (launched_world_size(), launched_rank()) == (8, 5)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            OPEN_MPI | MASTER | {"OMPI_COMM_WORLD_SIZE": "many"},
            "OMPI_COMM_WORLD_SIZE = 'many': expected a whole number",
        ),
        (OPEN_MPI | MASTER | {"OMPI_COMM_WORLD_RANK": "4"}, "there is no such process"),
        ({"PMIX_RANK": "0"}, "PMIX_RANK is set, but not how many"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK = '-1'"),
    ],
)
def test_nonsense_is_refused(variables: dict[str, str], message: str) -> None:
    os.environ |= variables
    with pytest.raises(EnvironmentFault, match=message):
        launched_rank()


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_rank_that_comes_to_look_when_its_launcher_is_gone_ends(
    is_gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LAUNCHER, raising=False)
    name_launcher()
    pid, started = os.environ[LAUNCHER].split()
    begun = int(started) - is_gone  # an earlier process of that number
    rank = subprocess.run(
        [sys.executable, "-c", "from megatron_ext.launcher import end_with_launcher; end_with_launcher()"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "none", LAUNCHER: f"{pid} {begun}"},
        check=False,
    )
    assert rank.returncode == (-signal.SIGTERM if is_gone else 0)
