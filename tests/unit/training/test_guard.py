"""The guard's decisions, with figures instead of steps."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config import GuardConfig
from megatron_ext.errors import TrainingError
from megatron_ext.monitoring.events import Event
from megatron_ext.training.guard.guard import Guard
from megatron_ext.training.hooks.base import StepDone
from megatron_ext.training.verdict import Figures, FirstNonFinite, Skip, Take, Verdict
from tests.unit.training.fakes import FakeSession, fake_session

FIRST = FirstNonFinite("first on rank 3", {"rank": 3, "micro_batch": 2})


class Judged:
    """A session whose steps have the figures that they are given."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.events: list[Event] = []
        self.session: FakeSession = fake_session(directory, train={"train_iters": 10**6})
        self.guard = Guard(GuardConfig(**settings), self.events.append)
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
    assert kinds == [("nonfinite", 2), ("skip", 2)]


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
