"""A session without a model: real state, stream and checkpoints, steps that compute nothing, and a loop over it."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.checkpoint.manager import CheckpointManager
from megatron_ext.data.stream.plan import Consumed
from megatron_ext.data.stream.position import Consumption, Position, SamplePlace
from megatron_ext.data.stream.stream import Batch
from megatron_ext.training.hooks.base import Hook, StepDone
from megatron_ext.training.loop import train_steps
from megatron_ext.training.session import Session
from megatron_ext.training.step import SourceSums, StepResult, never
from megatron_ext.training.tasks.pretrain import Pretrain
from megatron_ext.training.verdict import Rollback, Skip, Take, Verdict
from tests.support.minimal_run import load, mapping
from tests.unit.training.plans import plan_of_run

BATCH = 8


def sources(*units: float, loss: float = 2.5) -> SourceSums:
    """What a step says of its sources: each has the loss, over so many units."""
    return SourceSums(torch.tensor([loss * count for count in units]), torch.tensor([float(count) for count in units]))


class Numbers:
    """A stream whose batches say their number, and that remembers which were read."""

    def __init__(self) -> None:
        self.at, self.read = 0, list[int]()

    def next(self) -> Batch:
        self.read.append(self.at // BATCH)
        self.at += BATCH
        return [SimpleNamespace(number=self.read[-1])]  # type: ignore[list-item]

    def seek(self, position: Position) -> None:
        self.at = position.samples

    def position(self) -> Position:
        return Position(self.at)

    def consumption(self) -> Consumption:
        return Consumption({"ja": Consumed(self.at, 3 * self.at, 0.5), "en": Consumed(0, 0, 0.0)})

    def place(self, sample: int) -> SamplePlace:
        return SamplePlace("ja", sample, 0, "")

    def close(self) -> None:
        """Nothing reads ahead."""


class FakeSession(Session):
    """Takes every step, but for those that `verdicts` says something else of, once each."""

    verdicts: dict[int, Verdict]
    restored: list[str]
    """Names of the checkpoints it went back to."""

    def step(self, batch: Batch, asks_to_stop: Callable[[], bool] = never) -> StepResult:
        verdict = self.verdicts.pop(self.state.iteration + 1, Take())
        result = StepResult({"loss": torch.tensor(2.5)}, 0.7, verdict, int(asks_to_stop()), sources(1, 0))
        if isinstance(verdict, Rollback):
            self._roll_back(verdict)
        else:
            self._advance()
        return result


def fake_session(directory: Path, hooks: Sequence[Hook] = (), **sections: Any) -> FakeSession:
    run = load(mapping(checkpoint={"directory": str(directory)}, **sections))
    optimizer = SimpleNamespace(chained_optimizers=[], param_groups=[])
    trainable = SimpleNamespace(chunks=[], wrapped=[], optimizer=optimizer, participants=(), saved_weights=list)
    groups: Any = SimpleNamespace(world=None)
    session = FakeSession(
        run,
        run.resolve(1),
        groups,
        torch.device("cpu"),
        trainable,  # type: ignore[arg-type]
        Pretrain(),
        Numbers(),
        plan_of_run(run),
        CheckpointManager(directory, {}),
        hooks,
    )
    session.verdicts = {}
    restored = session.restored = []
    session.checkpoints.restore = lambda which, only=None: restored.append(which.name)  # type: ignore[method-assign]
    return session


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
    """Train to the end or to the stop: the signal that stopped it, or 0, and what hooks were told."""
    recorder, others = Recorder(), Others()
    number = train_steps(session, [recorder], stop or Stop(), others)  # type: ignore[arg-type]
    assert others.steps == sum(not isinstance(done.verdict, Skip) or done.result is not None for done in recorder.told)
    return number, recorder.told


def steps_of(told: list[StepDone]) -> list[int]:
    return [done.iteration for done in told]
