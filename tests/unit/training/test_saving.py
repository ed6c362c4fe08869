"""When a run saves, who is told, and which failures it survives; with real checkpoints of one weight."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.checkpoint.finite import NotFiniteError
from megatron_ext.checkpoint.manager import CheckpointManager
from megatron_ext.checkpoint.retention import Retention
from megatron_ext.checkpoint.second_place import SecondPlace
from megatron_ext.checkpoint.shards import TensorShard
from megatron_ext.config import CheckpointConfig
from megatron_ext.errors import CheckpointError, TrainingError
from megatron_ext.monitoring.clock import Clock
from megatron_ext.monitoring.events import Event
from megatron_ext.monitoring.metrics_file import MetricsFile
from megatron_ext.training.hooks.base import Hook, StepDone
from megatron_ext.training.hooks.saving import Saving
from megatron_ext.training.verdict import Take

LAST = 6


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Run(Hook):
    """A run that saves one weight; it keeps what it is told."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        config = CheckpointConfig(directory=str(directory), **settings)
        self.weight, self.events, self.complete = torch.ones(2000), list[Event](), list[str]()
        self.step = 0
        second = SecondPlace(config.copy_to) if config.copy_to is not None else None
        run = {"parallel": {}}
        manager = CheckpointManager(
            directory,
            run,
            retention=Retention(keep_last=config.keep_last),
            second_place=second,
            asynchronous=config.async_save,
        )
        manager.register("model", tensors=lambda: [TensorShard("w", (2000,), (0,), self.weight, is_writer=True)])
        counts = {"consumed_samples": 0, "data": [], "optimizer_steps": 0}
        manager.register("progress", scalars=lambda: {"iteration": self.step, **counts})
        self.session: Any = SimpleNamespace(checkpoints=manager, stage=lambda: manager.stage(self.step))
        self.saving = Saving(config, directory / "metrics.jsonl", Clock(), self.events.append, [self])
        self.saving.on_start(self.session)

    def after_save(self, checkpoint: Path) -> None:
        self.complete.append(checkpoint.name[-1])

    def train(self, steps: int = 1, signal: int = 0) -> None:
        for _ in range(steps):
            self.step += 1
            self.saving.after_step(self.session, StepDone(self.step, LAST, Take(), 0, signal=signal))

    def told(self) -> list[tuple[str, int]]:
        return [(event.kind, event.iteration) for event in self.events]


@pytest.fixture
def full_disk() -> Iterator[Any]:
    """Whether no file may become large, to be set."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def be_full(full: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000 if full else limits[0], limits[1]))

    yield be_full
    be_full(False)


@pytest.mark.parametrize("async_save", [True, False])
def test_it_saves_when_due_when_told_to_stop_and_at_the_end(async_save: bool, tmp_path: Path) -> None:
    run = Run(tmp_path, save_interval=2, async_save=async_save)
    run.train(2)
    run.train(signal=15)
    assert run.complete == ["2", "3"], "the run may end after a signal"
    run.train(3)
    assert run.complete == ["2", "3", "4", "6"]
    assert [event.kind for event in run.events] == ["checkpoint"] * 4
    assert run.events[0].text.startswith(f"saved {tmp_path / 'iter_0000002'} (")
    json.dumps([event.record() for event in run.events])


def test_a_checkpoint_that_a_kill_left_untold_is_told_when_the_run_goes_on(tmp_path: Path) -> None:
    records = MetricsFile(tmp_path / "metrics.jsonl")
    records.write({"event": "start", "iteration": 0})
    run = Run(tmp_path, save_interval=2)
    run.train(2)
    outcome = run.session.checkpoints.settle()  # and nobody tells
    records.write({"event": "start", "iteration": 2})
    [event] = Run(tmp_path).events
    print(event.text)
    assert (event.kind, event.iteration) == ("checkpoint", 2)
    assert event.text.startswith(f"saved {tmp_path / 'iter_0000002'} (")
    assert event.details["bytes"] == outcome.bytes > 8000
    records.write(event.record())
    assert Run(tmp_path).events == [], "once"
    (tmp_path / "metrics.jsonl").write_text('{"event": "start", "iteration": 2}\n')
    assert Run(tmp_path).events == [], "of a checkpoint that was there when the records began, there is no news"


def test_the_copy_of_the_last_checkpoint_is_told_too(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", copy_to=str(tmp_path / "second"))
    run.train(LAST)
    assert run.told() == [("checkpoint", LAST), ("checkpoint_copied", LAST)]


def test_a_save_that_fails_is_told_and_the_next_one_makes_up_for_it(tmp_path: Path, full_disk: Any) -> None:
    run = Run(tmp_path, save_interval=2)
    full_disk(True)
    run.train(2)
    while not run.session.checkpoints.poll():
        pass
    run.train()
    full_disk(False)
    run.train(3)
    assert run.complete == ["4", "6"]
    assert run.told()[0] == ("checkpoint_failed", 2), "the step that was not saved, not the one at which it was known"
    assert "File too large" in run.events[0].text
    assert "It is tried again at the next step that saves" in run.events[0].text
    assert [kind for kind, _ in run.told()] == ["checkpoint_failed", "checkpoint", "checkpoint"]


def test_a_place_that_cannot_be_written_stops_nothing_before_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = Run(tmp_path / "file" / "run", save_interval=2)
    run.train(4)
    assert run.told() == [("checkpoint_failed", 2), ("checkpoint_failed", 4)]


@pytest.mark.parametrize("signal", [0, 15])
def test_the_last_save_of_a_run_must_succeed(signal: int, tmp_path: Path, full_disk: Any) -> None:
    run = Run(tmp_path)
    full_disk(True)
    run.train(LAST - 1)
    with pytest.raises(CheckpointError, match="not saved"):
        run.train(signal=signal)
    assert run.told() == [("checkpoint_failed", LAST)]
    assert run.events[0].text.endswith(". The run ends without it")
    assert run.complete == []


def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    run = Run(tmp_path, save_interval=2)
    run.weight[7] = torch.inf
    with pytest.raises(NotFiniteError, match="such as w"):
        run.train(2)


def test_a_run_that_fails_waits_for_what_is_on_its_way(tmp_path: Path) -> None:
    run = Run(tmp_path, save_interval=2)
    run.train(2)
    run.saving.on_error(TrainingError("the loss is nan"))
    assert run.session.checkpoints.newest() == tmp_path / "iter_0000002"


def test_a_checkpoint_that_somebody_reads_stays(tmp_path: Path) -> None:
    run = Run(tmp_path, save_interval=1, keep_last=2, async_save=False)
    run.session.checkpoints.keep(lambda: [tmp_path / "iter_0000001"])
    run.train(4)
    assert sorted(path.name[-1] for path in tmp_path.glob("iter_*")) == ["1", "3", "4"]
