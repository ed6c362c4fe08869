"""Job files run from their first line to their last, beside a scheduler of a few lines: who is queued again.

PBS and Grid Engine are not here; Slurm's file runs under a real one in tests/slurm.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_ext.launching.job_file import write_job
from tests.support.waiting import HANGS
from tests.support.workspace import ROOT
from tests.unit.launching.jobs import job, profile

# Each starts what it is given on two nodes at once, as srun and mpirun do, and says the larger exit code.
STARTER = """#!/usr/bin/env bash
while [ "$1" != bash ]; do shift; done
for node in 0 1; do SLURM_NODEID=$node OMPI_COMM_WORLD_RANK=$node "$@" & done
code=0
for node in 1 2; do wait -n || { c=$?; [ $c -le $code ] || code=$c; }; done
exit $code
"""
NOTES = '#!/bin/sh\necho "$(basename "$0") $*" >> "$NOTES"\n'
JOBS = {
    "slurm": {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "moe", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"},
    "pbs": {"PBS_JOBID": "7.server", "PBS_NODEFILE": "nodes"},
    "age": {"JOB_ID": "7", "PE_HOSTFILE": "nodes"},
}


def run_job(scheduler: str, directory: Path, nodes: str) -> tuple[int, str, str]:
    """Run the job of a run whose nodes end with the exit codes `nodes`; its own, what it queued, and what it said."""
    programs, root, notes = directory / "bin", directory / "root", directory / "notes"
    (root / "launch").mkdir(parents=True)
    shutil.copytree(ROOT / "launch" / "templates", root / "launch" / "templates")
    (root / "launch" / "torchrun.sh").write_text(
        f'#!/bin/sh\necho "$TOOL $NODE_RANK $NNODES $MASTER_ADDR $NPROC_PER_NODE $*" >> {directory}/ran\n'
        f'[ "$TOOL" = tools/preflight.py ] || exit "$(echo {nodes} | cut -d" " -f$((NODE_RANK + 1)))"\n'
    )
    programs.mkdir()
    for name in ("srun", "mpirun"):
        (programs / name).write_text(STARTER)
    for name in ("scontrol", "qsub"):
        # Slurm itself ends a job that is queued again.
        ends = '[ "$1" = show ] && echo n1\n[ "$1" = requeue ] && kill -KILL $PPID\nexit 0\n'
        (programs / name).write_text(NOTES + ends)
    for program in (*programs.iterdir(), root / "launch" / "torchrun.sh"):
        program.chmod(0o755)
    (directory / "nodes").write_text("n1 8 all.q\nn2 8 all.q\n" if scheduler == "age" else "n1\nn1\nn2\nn2\n")
    this = job(directory, profile(scheduler=scheduler), root=root)
    write_job(this)
    usual = {"PATH": f"{programs}:{os.environ['PATH']}", "NOTES": str(notes), **JOBS[scheduler]}
    done = subprocess.run(["bash", this.file], env=usual, cwd=directory, capture_output=True, text=True, timeout=HANGS)
    queued = [line for line in notes.read_text().splitlines() if " show " not in line] if notes.exists() else []
    return done.returncode, "\n".join(queued), done.stdout + done.stderr


@pytest.mark.parametrize("scheduler", JOBS)
def test_a_run_that_was_stopped_and_saved_is_queued_again(scheduler: str, tmp_path: Path) -> None:
    code, queued, said = run_job(scheduler, tmp_path, "143 142")
    print(said)
    expected = {
        "slurm": (-9, "scontrol requeue 7"),
        "pbs": (143, f"qsub -v MEGATRON_EXT_REQUEUES=1 {tmp_path}/job.sh"),
        "age": (99, ""),
    }
    assert (code, queued) == expected[scheduler]
    ran = sorted((tmp_path / "ran").read_text().splitlines())
    run = f"2 n1 8 {tmp_path}/my run.yaml train.seed=7"
    limit = "" if scheduler == "slurm" else " train.exit_at.minutes_before_limit=10"
    assert ran == sorted(
        f"{tool} {node} {run}{limit}" for tool in ("tools/preflight.py", "tools/train.py") for node in (0, 1)
    )


@pytest.mark.parametrize("scheduler", JOBS)
@pytest.mark.parametrize(("nodes", "code"), [("0 0", 0), ("143 1", 1), ("2 2", 2)], ids=["done", "failed", "bad input"])
def test_nothing_else_is(scheduler: str, nodes: str, code: int, tmp_path: Path) -> None:
    ended, queued, said = run_job(scheduler, tmp_path, nodes)
    assert (ended, queued) == (code, "")
    assert ("done" if code == 0 else f"ended with exit code {code}: ") in said
