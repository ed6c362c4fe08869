"""The loop: batches from the stream, one verdict a step, and hooks that see all of them in order."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.data.stream.position import Position
from megatron_ext.errors import EnvironmentFault
from megatron_ext.training.hooks.base import Hook, StepDone
from megatron_ext.training.loop import _prepared, telling_hooks, train_steps
from megatron_ext.training.session import Session
from megatron_ext.training.verdict import Rollback, Skip, Take
from tests.support.minimal_run import load, mapping
from tests.unit.training.fakes import fake_session


class Recorder(Hook):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[StepDone] = []
        self.calls: list[str] = []

    def on_start(self, session: Session) -> None:
        self.calls.append("start")

    def after_step(self, session: Session, done: StepDone) -> None:
        self.told.append(done)

    def on_error(self, error: BaseException) -> None:
        self.calls.append(f"error: {error}")

    def close(self) -> None:
        self.calls.append("close")


class Stop:
    """SIGTERM from step `at` on."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.steps = at, 0

    def is_noted(self) -> bool:
        self.steps += 1
        return self.at is not None and self.steps >= self.at

    def agreed(self, asked: int, group: dist.ProcessGroup, device: Any) -> int:
        return signal.SIGTERM if asked else 0


class Others:
    """Nobody else; notes how many steps are said to begin."""

    def __init__(self) -> None:
        self.steps = 0

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        self.steps += 1
        yield


def run(session: Any, stop: Stop | None = None) -> tuple[int, list[StepDone]]:
    recorder, others = Recorder(), Others()
    signal = train_steps(session, [recorder], stop or Stop(), others)  # type: ignore[arg-type]
    assert others.steps == sum(not isinstance(done.verdict, Skip) or done.result is not None for done in recorder.told)
    return signal, recorder.told


def steps_of(told: list[StepDone]) -> list[int]:
    return [done.iteration for done in told]


def test_every_step_takes_the_next_batch_and_hooks_see_each(tmp_path: Path) -> None:
    session = fake_session(tmp_path, train={"train_iters": 9, "stop_at_iteration": 3})
    assert run(session)[0] == 0
    assert session.stream.read == [0, 1, 2]
    assert (session.state.iteration, session.state.consumed_samples) == (3, 24)
    assert run(session) == (0, [])  # nothing to do


def test_steps_of_skip_steps_are_not_even_read(tmp_path: Path) -> None:
    session = fake_session(tmp_path, train={"train_iters": 5, "skip_steps": [[2, 3]]})
    _, told = run(session)
    assert session.stream.read == [0, 3, 4]
    skip = Skip("train.skip_steps")
    assert [done.verdict for done in told] == [Take(), skip, skip, Take(), Take()]
    assert [done.first_sample for done in told] == [0, 8, 16, 24, 32]
    assert [done.result is None for done in told] == [False, True, True, False, False]


def test_a_signal_ends_after_the_step_and_the_last_step_ends_as_planned(tmp_path: Path) -> None:
    session = fake_session(tmp_path, train={"train_iters": 5})
    number, told = run(session, Stop(at=3))
    assert (number, steps_of(told), told[-1].signal) == (signal.SIGTERM, [1, 2, 3], signal.SIGTERM)
    number, told = run(session, Stop(at=2))
    assert (number, steps_of(told), told[-1].signal) == (0, [4, 5], 0)


def test_a_run_that_is_rolled_back_goes_on_behind_the_data_that_it_passes_over(tmp_path: Path) -> None:
    session = fake_session(tmp_path, train={"train_iters": 9, "stop_at_iteration": 8})
    session.verdicts = {2: Skip("a spike"), 4: Rollback("another", Path("iter_0000001"), 6)}
    _, told = run(session)
    assert steps_of(told) == [1, 2, 3, 6, 7, 8]
    assert session.stream.read == [0, 1, 2, 3, 6, 7]
    assert session.restored == ["iter_0000001"]
    assert [done.is_due(1) for done in told] == [True] * 3 + [False] + [True] * 2
    session = fake_session(tmp_path, train={"train_iters": 9, "stop_at_iteration": 4})
    session.verdicts = {4: Rollback("beyond the end of this job", Path("iter_0000001"), 6)}
    _, told = run(session)
    assert (steps_of(told), told[-1].is_due(None), session.state.consumed_samples) == ([1, 2, 3, 6], True, 48)


def test_hooks_are_told_how_the_run_ends() -> None:
    recorder = Recorder()
    with telling_hooks([recorder]):
        pass
    with pytest.raises(KeyError), telling_hooks([recorder]):
        raise KeyError("gone")
    assert recorder.calls == ["close", "error: 'gone'"]


def test_what_happens_every_few_steps_happens_after_the_last_too() -> None:
    steps = [StepDone(iteration, 5, Take(), 0) for iteration in range(1, 6)]
    assert [done.iteration for done in steps if done.is_due(2)] == [2, 4, 5]
    assert [done.iteration for done in steps if done.is_due(None)] == [5]


def test_old_checkpoints_know_the_number_of_samples_alone(tmp_path: Path) -> None:
    session = fake_session(tmp_path)
    session._restore_progress({"iteration": 3, "consumed_samples": 24, "data": ["a"]})
    assert (session.state.iteration, session.state.data) == (3, ("a",))
    assert session.stream.position() == Position(24)
    with pytest.raises(ValueError, match="is no position"):
        session._restore_progress({"iteration": 3, "consumed_samples": -1, "data": []})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_memory_of_a_host_needs_a_gpu_beside_it() -> None:
    run = load(mapping(optimizer={"kind": "adam", "lr": 1e-3, "moments_on_host": True}))
    with pytest.raises(EnvironmentFault, match=r"optimizer\.moments_on_host = true, but no GPU is here.* remove it"):
        _prepared(run)
    run = load(mapping(recompute={"offload_layers": 2}))
    with pytest.raises(EnvironmentFault, match=r"recompute\.offload_layers = 2, but no GPU is here.* remove it"):
        _prepared(run)
