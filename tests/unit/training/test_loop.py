"""The loop: batches from the stream, one verdict a step, and hooks that see all of them in order."""

import signal
from pathlib import Path

import pytest
import torch

from megatron_ext.data.stream.position import Position
from megatron_ext.errors import EnvironmentFault
from megatron_ext.training.hooks.base import StepDone
from megatron_ext.training.loop import _prepared, telling_hooks
from megatron_ext.training.verdict import Rollback, Skip, Take
from tests.support.minimal_run import load, mapping
from tests.unit.training.fakes import Recorder, Stop, fake_session, run, steps_of


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
