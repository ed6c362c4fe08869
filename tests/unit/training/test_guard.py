"""The guard's decisions, with figures instead of steps."""

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ext.config import GuardConfig, RollbackConfig, SpikeConfig
from megatron_ext.data.stream.position import Position
from megatron_ext.errors import TrainingError
from megatron_ext.monitoring.events import Event
from megatron_ext.training.guard.guard import Guard
from megatron_ext.training.guard.spikes import SpikeWindow
from megatron_ext.training.hooks.base import StepDone
from megatron_ext.training.verdict import Figures, FirstNonFinite, Rollback, Skip, Take, Verdict
from tests.unit.training.fakes import FakeSession, fake_session
from tests.unit.training.plans import part, plan_of

FIRST = FirstNonFinite("first on rank 3", {"rank": 3, "micro_batch": 2})


class Judged:
    """A session whose steps have the figures that they are given."""

    def __init__(self, directory: Path, **keys: Any) -> None:
        self.events: list[Event] = []
        self.session: FakeSession = fake_session(directory, train={"train_iters": 10**6})
        self.guard = Guard(GuardConfig(**keys), self.events.append)
        self.guard.on_start(self.session)

    def step(self, loss: float, norm: float = 1.0, units: float = 10.0) -> Verdict:
        """Judge a step, and put it behind the run."""
        losses = {"loss": torch.tensor(loss), "output_z_loss": torch.tensor(0.1)}
        verdict = self.guard(Figures(losses, norm, torch.tensor(units), lambda: FIRST))
        first = self.session.stream.position().samples
        self.session.pass_over()
        self.guard.after_step(self.session, StepDone(self.session.state.iteration, 10**6, verdict, first))
        return verdict


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (2.0, math.inf), (math.nan, math.nan), (-math.inf, 1.0)])
def test_a_loss_or_a_gradient_that_is_not_finite_is_skipped(loss: float, norm: float, tmp_path: Path) -> None:
    run = Judged(tmp_path)
    assert run.step(2.0) == Take()
    assert run.step(loss, norm) == Skip("not finite")
    (event,) = run.events
    assert (event.kind, event.iteration, event.details["rank"]) == ("nonfinite", 2, 3)
    assert event.text.endswith("first on rank 3")
    # Micro-batch 2 of the second global batch of 8, one sample each.
    assert (event.details["samples"], event.details["sources"]) == ([10, 10], ["ja"])
    kinds = [(entry["kind"], entry["step"]) for entry in run.guard.state()["audit"]]
    assert kinds == [("start", 0), ("nonfinite", 2), ("skip", 2)]


@pytest.mark.parametrize("most", [0, 1, 3])
def test_so_many_in_a_row_are_skipped_and_the_next_ends_the_run(most: int, tmp_path: Path) -> None:
    run = Judged(tmp_path, max_nonfinite_in_row=most)
    for _ in range(2):  # a step that is taken begins a new row
        assert all(isinstance(run.step(math.nan), Skip) for _ in range(most))
        assert run.step(2.0) == Take()
    assert all(isinstance(run.step(math.nan), Skip) for _ in range(most))
    with pytest.raises(TrainingError, match=rf"the weights were not updated. guard.max_nonfinite_in_row = {most}"):
        run.step(math.nan)


def test_batches_without_a_label_are_passed_over_and_not_looked_into(tmp_path: Path) -> None:
    run = Judged(tmp_path, max_nonfinite_in_row=1)
    verdict = run.step(0.0, math.nan, units=0)
    assert isinstance(verdict, Skip)
    assert verdict.reason.startswith("no label of the global batch counts")
    assert run.events == []
    with pytest.raises(TrainingError, match="no label of the global batch counts"):
        run.step(0.0, math.nan, units=0)


def test_its_memory_is_saved_and_an_older_checkpoint_has_none(tmp_path: Path) -> None:
    run, other = Judged(tmp_path), Judged(tmp_path)
    run.step(math.nan)
    other.guard.restore(run.guard.state())
    assert other.guard.state() == run.guard.state()
    other.guard.restore({})
    assert other.guard.state()["audit"] == []
    with pytest.raises(ValueError, match="audit is no list of entries"):
        other.guard.restore({"audit": [{"kind": 3}]})


SPIKES = SpikeConfig()
FINITE = st.floats(0.0, 10.0, allow_nan=False)


@given(st.lists(st.tuples(FINITE, FINITE), min_size=80, max_size=150), st.sampled_from([4, 16, 128]))
@settings(max_examples=20)
def test_what_stands_out_is_what_olmo_core_skips(steps: list[tuple[float, float]], window: int) -> None:
    ours = SpikeWindow(SpikeConfig(window=window, min_steps=max(window // 2, 2), sigma=1.5))
    for count, (loss, norm) in enumerate(steps, start=1):
        takes = True
        if count >= max(window // 2, 3):
            before = torch.tensor(steps[max(count - 1 - window, 0) : count - 1], dtype=torch.float64)
            deviations, means = torch.std_mean(before, dim=0)
            latest = torch.tensor((loss, norm), dtype=torch.float64)
            margin = latest - means - 1.5 * deviations
            if bool((margin.abs() < 1e-9).any()):
                ours.judge(loss, norm)
                continue  # equal to rounding
            takes = bool((margin <= 0).all())
        assert (ours.judge(loss, norm) is None) == takes


def wave(step: int) -> float:
    """A loss that wavers, with a deviation of 0.07."""
    return 2.0 + 0.1 * math.sin(step)


def test_a_spike_is_skipped_after_64_steps_and_no_more_than_five_of_a_thousand(tmp_path: Path) -> None:
    run = Judged(tmp_path, spikes=SPIKES)
    assert run.step(9.0) == Take()  # nothing to compare with
    verdicts = [run.step(wave(step), 5.0 if step == 300 else 1.0 + 0.1 * math.cos(step)) for step in range(1, 301)]
    assert set(verdicts[:-1]) == {Take()}
    assert isinstance(verdicts[-1], Skip)
    assert verdicts[-1].reason.startswith("gradient norm 5 is above 1.")
    assert "6 standard deviations over the mean of 128 steps" in verdicts[-1].reason
    # So many in a row become the level: they stay in the window.
    assert [type(run.step(4.0 * 3**n)) for n in range(5)] == [Skip] * 4 + [Take]
    assert run.events[-1].text.endswith("taken, as 5 of the last 1000 steps were skipped")
    assert [event.kind for event in run.events] == ["spike"] * 6


def test_another_stage_of_the_data_has_another_loss(tmp_path: Path) -> None:
    run = Judged(tmp_path, spikes=SPIKES, rollback=RollbackConfig())
    run.session.plan = plan_of(part("en", 100), part("ja", 100))
    assert {run.step(wave(step)) for step in range(100)} == {Take()}
    assert {run.step(wave(step) + 3) for step in range(100)} == {Take()}


def save_at(directory: Path, *steps: int) -> None:
    """What looks like complete checkpoints."""
    for step in steps:
        checkpoint = directory / f"iter_{step:07d}"
        checkpoint.mkdir()
        (checkpoint / ".metadata").touch()
        (checkpoint / "__0_0.distcp").touch()


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_loss_that_stays_too_high_goes_back_far_enough_and_the_second_time_stops(tmp_path: Path) -> None:
    save_at(tmp_path, 100, 200, 250, 300)
    run = Judged(tmp_path, rollback=RollbackConfig())
    run.session.groups.world = dist.group.WORLD
    losses = [wave(step) + (1.0 if step >= 310 else 0.0) for step in range(2000)]
    while isinstance(verdict := run.step(losses[run.session.state.iteration]), Take):
        pass
    # The running mean is out of bounds with the tenth bad step, and for twenty steps with the 29th.
    at = run.session.state.iteration
    assert isinstance(verdict, Rollback)
    assert (verdict.checkpoint.name, verdict.resume_at) == ("iter_0000200", 400)
    assert 330 <= at <= 340, at
    (event,) = run.events
    assert (event.kind, event.details) == ("rollback", {"step": at, "checkpoint": 200, "resumed": 400, "rewarm": 100})
    assert [run.guard.rate_factor(step) for step in (399, 400, 449, 499, 500)] == [1.0, 0.01, 0.5, 1.0, 1.0]
    run.session.stream.seek(Position(400 * 8))
    run.session.state = replace(run.session.state, iteration=400, consumed_samples=3200)
    losses = [wave(step) + (1.0 if step >= 500 else 0.0) for step in range(400, 600)]
    with pytest.raises(TrainingError, match=f"The run went back at step {at} already") as stop:
        list(map(run.step, losses))
    assert "half the optimizer.lr" in str(stop.value)
    assert run.events[-1].kind == "guard_stop"


@pytest.mark.usefixtures("alone")
def test_without_a_checkpoint_old_enough_it_stops_and_one_it_left_is_not_taken(tmp_path: Path) -> None:
    run = Judged(tmp_path, rollback=RollbackConfig(min_steps_back=5, horizon=1), max_nonfinite_in_row=0)
    run.session.groups.world = dist.group.WORLD
    with pytest.raises(TrainingError, match="No checkpoint of step 0 or before to go back to"):
        run.step(math.nan)
    save_at(tmp_path, 10, 20)
    run.session.state = replace(run.session.state, iteration=30)
    verdict = run.step(math.nan)
    assert isinstance(verdict, Rollback)
    assert verdict.checkpoint.name == "iter_0000020"
    assert verdict.resume_at == 220
    run.session.state = replace(run.session.state, iteration=32)
    verdict = run.step(math.nan)
    assert isinstance(verdict, Rollback)
    assert verdict.checkpoint.name == "iter_0000020"
    save_at(tmp_path, 25)  # newer than what it went back to, and older than when it noticed
    run.session.state = replace(run.session.state, iteration=34)
    verdict = run.step(math.nan)
    assert isinstance(verdict, Rollback)
    assert verdict.checkpoint.name == "iter_0000020"


@pytest.mark.usefixtures("alone")
@given(
    st.lists(st.sampled_from([2.0, 2.1, 1.9, 2.05, 1.95, 9.0, math.nan]), min_size=150, max_size=400),
    st.lists(st.integers(0, 400), max_size=4),
)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_run_that_is_interrupted_decides_as_one_that_is_not(losses: list[float], stops: list[int]) -> None:
    def verdicts(stops: list[int]) -> list[str]:
        said = []
        with tempfile.TemporaryDirectory() as directory:
            keys: dict[str, Any] = {"spikes": SpikeConfig(max_skips=3), "rollback": RollbackConfig(sustained_steps=9)}
            run = Judged(Path(directory), **keys)
            run.session.groups.world = dist.group.WORLD
            save_at(Path(directory), 0)
            for number, loss in enumerate(losses):
                if number in stops:
                    saved = json.loads(json.dumps(run.guard.state()))
                    run.guard = Guard(GuardConfig(**keys), run.events.append)
                    run.guard.restore(saved)
                    run.guard.on_start(run.session)
                try:
                    said.append(f"{run.step(loss)} {run.guard.rate_factor(number)}".replace(directory, ""))
                except TrainingError as error:
                    return [*said, str(error).replace(directory, "")]
        return said

    assert verdicts(stops) == verdicts([])
