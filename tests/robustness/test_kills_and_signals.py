"""Runs that are killed or asked to stop at any moment lose nothing that was saved, and end as the undisturbed run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.checkpoint.find import complete_checkpoints, find_checkpoint, require_checkpoint
from megatron_ext.checkpoint.state_file import read_state
from megatron_ext.checkpoint.streams import MegatronSource
from megatron_ext.locks import LOCK_FILE
from megatron_ext.testing.pool import GlooPool, WorkerFailure
from tests.robustness.runs import losses, moments, train_and_die, train_and_signal, train_here
from tests.support.commands import TOOLS
from tests.support.waiting import ended_at_last, wait_until

KILLS = 17


@pytest.fixture(scope="module")
def undisturbed(work: Path, pool: GlooPool) -> tuple[Path, int]:
    """A run to the end, and how many operations on files it took."""
    directory = work / "undisturbed"
    arguments = (work / "run.yaml", [f"checkpoint.directory={directory}"])
    # In a process of its own, for the hook that counts stays; beyond every number it kills nobody.
    with GlooPool(1) as alone:
        [operations] = alone.run(1, train_and_die, *arguments, directory, 10**9)
    return directory, operations


def test_killed_again_and_again_it_ends_as_the_undisturbed_run(work: Path, undisturbed: tuple[Path, int]) -> None:
    expected, operations = undisturbed
    directory = work / "killed"
    arguments = (work / "run.yaml", [f"checkpoint.directory={directory}"])
    reached = []
    with GlooPool(1) as alone:
        for moment in moments(12, KILLS, operations // 2):
            with pytest.raises(WorkerFailure, match="rank 0 died"):
                alone.run(1, train_and_die, *arguments, directory, moment)
            checkpoint = find_checkpoint(directory) if directory.is_dir() else None
            reached.append((moment, read_state(checkpoint).iteration if checkpoint else 0))
        alone.run(1, train_here, *arguments)
    print(f"killed before file operation: step of the newest checkpoint then: {reached}, of {operations}")
    assert losses(directory) == losses(expected)
    weights, others = (MegatronSource(require_checkpoint(place)) for place in (directory, expected))
    assert all((weights.read(name) == others.read(name)).all() for name in others.specs)
    assert not [path.name for path in directory.iterdir() if path.name.endswith((".partial", LOCK_FILE))]


def test_generating_that_is_ended_leaves_no_temporary_model(undisturbed: tuple[Path, int], tmp_path: Path) -> None:
    checkpoint, _ = undisturbed
    # So many that it is at it for minutes.
    call = [sys.executable, TOOLS / "generate.py", checkpoint, "--max-new-tokens", "100", "--prompts", *["the"] * 9000]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(call, env={**os.environ, "TMPDIR": str(tmp_path)}, **streams)
    with ended_at_last(process):
        wait_until(lambda: list(tmp_path.glob("megatron-ext-*")), process=process)
        assert process.poll() is None, "it ended before it could be asked to"
        process.terminate()
        _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("megatron-ext-*"))


@pytest.mark.parametrize(("rank", "number"), [(1, signal.SIGTERM), (0, signal.SIGINT), (1, signal.SIGUSR1)])
def test_all_ranks_stop_after_the_same_step_with_a_checkpoint(
    rank: int, number: signal.Signals, work: Path, pool: GlooPool
) -> None:
    directory = work / number.name
    # No step is saved by plan.
    overrides = [f"checkpoint.directory={directory}", "checkpoint.save_interval=null", "train.train_iters=100000"]
    arguments = (work / "run.yaml", overrides, rank, number, directory / "metrics.jsonl", 3)
    before = signal.getsignal(number)
    assert pool.run(2, train_and_signal, *arguments) == [number, number]
    assert signal.getsignal(number) == before
    steps = [step for step, _ in losses(directory)]
    assert steps == list(range(1, len(steps) + 1))
    assert read_state(require_checkpoint(directory)).iteration == len(steps)


def test_after_a_signal_it_goes_on_as_the_undisturbed_run(
    work: Path, undisturbed: tuple[Path, int], pool: GlooPool
) -> None:
    directory = work / "stopped"
    overrides = [f"checkpoint.directory={directory}", "checkpoint.save_interval=null"]
    arguments = (work / "run.yaml", overrides, 0, signal.SIGTERM, directory / "metrics.jsonl", 2)
    [stopped_by] = pool.run(1, train_and_signal, *arguments)
    assert stopped_by in (0, signal.SIGTERM)  # 0: the signal came after the last of six quick steps
    assert pool.run(1, train_here, work / "run.yaml", overrides) == [0]
    assert losses(directory) == losses(undisturbed[0])


def test_a_job_that_ends_before_its_run_goes_on_as_the_undisturbed_run(
    work: Path, undisturbed: tuple[Path, int], pool: GlooPool
) -> None:
    directory = work / "jobs"
    overrides = [f"checkpoint.directory={directory}", "checkpoint.save_interval=null", "train.exit_at.iteration=4"]
    ends = [
        pool.run(ranks, train_here, work / "run.yaml", [*overrides, *more])
        for ranks, more in ((2, ["train.exit_at.minutes=1e-6"]), (1, []), (1, []))  # the clock, a step, then to the end
    ]
    assert ends == [[signal.SIGALRM] * 2, [signal.SIGALRM], [0]]
    assert [read_state(path).iteration for path in complete_checkpoints(directory)] == [1, 4, 6]
    measured, expected = losses(directory), losses(undisturbed[0])
    assert measured == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected]  # a step on two ranks
