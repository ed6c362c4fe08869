"""Everything a run has in its hands while it trains: model, optimizer, data, groups; how they are saved and loaded."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.find import find_checkpoint
from megatron_ext.checkpoint.load import holds_optimizer
from megatron_ext.checkpoint.manager import CheckpointManager, RankState
from megatron_ext.checkpoint.second_place import SecondPlace
from megatron_ext.checkpoint.state_file import TrainingState, holds_adapters, read_state
from megatron_ext.config import Layout, RunConfig
from megatron_ext.data.stream.plan import RunPlan, StagePlan
from megatron_ext.data.stream.position import Position
from megatron_ext.data.stream.progress import to_json
from megatron_ext.data.stream.stream import Batch, DataStream
from megatron_ext.errors import TrainingError
from megatron_ext.mcore.build import Trainable, build_trainable
from megatron_ext.mcore.model import gather_parameters, routers
from megatron_ext.mcore.moe.router import require_directions
from megatron_ext.mcore.optimizer import optimizer_steps, set_learning_rate, set_optimizer_steps
from megatron_ext.mcore.rotary import set_rotary_base
from megatron_ext.mcore.state import optimizer_shards
from megatron_ext.planning.room import retention_of
from megatron_ext.runtime.deterministic import naming_what_is_not
from megatron_ext.runtime.pace import Pace
from megatron_ext.runtime.process_groups import Groups
from megatron_ext.runtime.seeds import random_state, restore_random_state
from megatron_ext.training.frozen_base import FrozenBase
from megatron_ext.training.guard.guard import Guard
from megatron_ext.training.hooks.base import Hook
from megatron_ext.training.reference import StoredReference
from megatron_ext.training.same_run import (
    check_same_adapters,
    check_same_data,
    check_same_model,
    check_same_task,
    levers,
    recorded_run,
    trained_model,
)
from megatron_ext.training.schedule import learning_rate
from megatron_ext.training.schedule_faults import schedule_end
from megatron_ext.training.start import OpenForeign, load_weights, no_foreign_weights
from megatron_ext.training.step import StepResult, never, train_step, unmarked, validation_loss
from megatron_ext.training.tasks.base import TrainTask
from megatron_ext.training.tasks.choose import task_of
from megatron_ext.training.tasks.preference import Preference
from megatron_ext.training.verdict import Judge, Rollback, take_finite

log = logging.getLogger(__name__)

_TRAINED_STATE = ("model", "optimizer", "participants")
"""What of a checkpoint training changes, besides where it stands."""


def unscaled(step: int) -> float:
    """The learning rate of `step` is that of the schedule."""
    return 1.0


@dataclass
class Session:
    """One rank's part of a run. Built by `open_session`, after the process groups are."""

    run: RunConfig
    layout: Layout
    groups: Groups
    device: torch.device
    trainable: Trainable
    task: TrainTask
    stream: DataStream
    """What it trains on; its position is the run's."""
    plan: RunPlan
    """The plan of `stream`: which stage each step belongs to."""
    checkpoints: CheckpointManager
    hooks: Sequence[Hook] = ()
    """Their state is saved with the rest."""
    state: TrainingState = TrainingState()
    judge: Judge = take_finite
    """Whether a step is taken."""
    rate_factor: Callable[[int], float] = unscaled
    """What the learning rate of a step, counted from 0, is multiplied by besides the schedule."""
    levers: Sequence[tuple[str, str, str]] = ()
    """Keys that bear on what is computed and were changed since the last checkpoint, with their old and new values."""
    pace: Pace = field(default_factory=Pace)
    """How long this rank needs for its own part of a step."""
    mark: Callable[[str], None] = unmarked
    """Told of each part of a step when it is over."""
    base: FrozenBase | None = None
    """The weights that are not trained, where only what is beside them is."""
    reference: StoredReference | None = None
    """What answers are compared with, where that is kept in files."""

    def __post_init__(self) -> None:
        self._num_sources = len(self.stream.consumption().sources)
        self._rotary_base = self.run.model.rotary_base
        self._register_states()

    @property
    def chunks(self) -> list[Any]:
        """Model chunks as built; their weights are what is saved."""
        return list(self.trainable.chunks)

    @property
    def wrapped(self) -> list[Any]:
        """The same chunks wrapped for training."""
        return self.trainable.wrapped

    @property
    def optimizer(self) -> Any:
        """The optimizer of this rank's parameters."""
        return self.trainable.optimizer

    def step(self, batch: Batch, asks_to_stop: Callable[[], bool] = never) -> StepResult:
        """Train on a global batch that `stream` gave out; that step is behind the run then.

        Raises:
            TrainingError: the run cannot go on, such as with a gradient that is not finite.
        """
        self._set_rotary_base(self.plan.stage_of_step(self.state.iteration))
        set_learning_rate(self.optimizer, self.learning_rate(self.state.iteration))
        try:
            with naming_what_is_not():
                result = train_step(
                    self.trainable,
                    self.task,
                    batch,
                    self.groups,
                    max_norm=self.run.optimizer.clip_grad,
                    num_sources=self._num_sources,
                    judge=self.judge,
                    asks_to_stop=asks_to_stop,
                    mark=self.mark,
                )
        except TrainingError as error:
            raise TrainingError(f"step {self.state.iteration + 1}: {error}") from error
        if isinstance(result.verdict, Rollback):
            self._roll_back(result.verdict)
        else:
            self._advance()
        return result

    def learning_rate(self, step: int) -> float:
        """The learning rate of `step`, counted from 0: the schedule, and how far it is warmed up after a rollback."""
        return learning_rate(self.run, self.plan, step) * self.rate_factor(step)

    def skips_next(self) -> str | None:
        """Which key of the configuration says to pass over the next step; None where none does."""
        train, step, sample = self.run.train, self.state.iteration + 1, self.state.consumed_samples
        if any(first <= step <= last for first, last in train.skip_steps):
            return "train.skip_steps"
        size = self.plan.stage_of_step(self.state.iteration).global_batch_size if train.skip_samples else 0
        reads_one = any(first < sample + size and sample <= last for first, last in train.skip_samples)
        return "train.skip_samples" if reads_one else None

    def pass_over(self) -> None:
        """Advance by one step without reading its samples."""
        at, stage = self.stream.position(), self.plan.stage_of_step(self.state.iteration)
        self._set_rotary_base(stage)
        self.stream.seek(at.after(stage.global_batch_size))
        self._advance()

    def ends_stage(self) -> bool:
        """Whether the last step was that of a stage."""
        stage = self.plan.stage_of_step(self.state.iteration - 1)
        return self.plan.ends(stage) and self.state.iteration == stage.first_step + stage.steps

    def _set_rotary_base(self, stage: StagePlan) -> None:
        """Have the model turn as `stage` asks for; checkpoints say it."""
        base = self.run.model.rotary_base if stage.rotary_base is None else stage.rotary_base
        if base != self._rotary_base:
            set_rotary_base(self.chunks, base)
            self._rotary_base, self.checkpoints.run = base, recorded_run(self.run, base)

    def _advance(self) -> None:
        self.state = dataclasses.replace(
            self.state,
            iteration=self.state.iteration + 1,
            consumed_samples=self.stream.position().samples,
        )

    def validate(
        self, batches: Iterable[Batch], num_sources: int = 1
    ) -> tuple[dict[str, float], list[tuple[float | None, float]]]:
        """The task's sums over `batches`, the loss first; of each source its loss, None without a unit, and units."""
        losses, sources = validation_loss(self.trainable, self.task, batches, self.groups, num_sources)
        by_source: list[tuple[float | None, float]] = [(None, 0.0)] * num_sources
        if sources is not None:
            by_source = sources.read()
        return {name: float(loss) for name, loss in losses.items()}, by_source

    def save(self) -> Path:
        """Save a checkpoint."""
        self.stage()
        return self.checkpoints.finish()

    def stage(self) -> None:
        """Take what a checkpoint is made of, which `checkpoints` then completes while the run goes on."""
        gather_parameters(self.wrapped)
        self.checkpoints.stage(self.state.iteration)

    def resume(self, checkpoint: Path) -> None:
        """Continue from `checkpoint`, saved in any layout."""
        state = read_state(checkpoint)
        check_same_model(trained_model(self.run.model, state, checkpoint), checkpoint)
        check_same_adapters(self.run.model, self.run.adapters, checkpoint)
        if state.consumed_samples:
            check_same_task(self.run.task, checkpoint, has_adapters=self.run.adapters is not None)
            check_same_data(self.run.data, self.run.train, checkpoint)
        was_trained = not holds_adapters(checkpoint) or holds_optimizer(checkpoint)
        if self.run.checkpoint.load_optimizer and was_trained:
            self.checkpoints.restore(checkpoint)
        else:
            hooks = [hook.name for hook in self.hooks if hook.name]
            # Adapters from elsewhere have no reference yet: it is the base.
            own = (("base", self.base), ("reference", self.reference if was_trained else None))
            kept = [name for name, one in own if one is not None]
            self.checkpoints.restore(checkpoint, only=[*kept, "model", "progress", *hooks])
            self._take_over_weights()
        self._set_rotary_base(self.plan.stage_of_step(max(self.state.iteration - 1, 0)))
        self.levers = levers(self.run, checkpoint)
        layout = "" if self.checkpoints.has_layout_of(checkpoint) else ", in another layout"
        log.info("continuing %s at step %d%s", checkpoint, self.state.iteration, layout)

    def _roll_back(self, verdict: Rollback) -> None:
        """Take weights and optimizer from the checkpoint that `verdict` names, and pass over the data until then.

        The run never counts backwards: what follows is as if it had gone on from that checkpoint and passed over all
        steps since.
        """
        self.checkpoints.restore(verdict.checkpoint, only=_TRAINED_STATE)
        if self.base is not None:
            self.base.mend()
        self.stream.seek(Position(self.plan.samples_at(verdict.resume_at)))
        self.state = dataclasses.replace(
            self.state, iteration=verdict.resume_at, consumed_samples=self.stream.position().samples
        )
        self._set_rotary_base(self.plan.stage_of_step(self.state.iteration - 1))
        log.info("weights and optimizer of %s, at step %d", verdict.checkpoint, verdict.resume_at)

    def initialize_from(self, path: str | Path, open_foreign: OpenForeign) -> None:
        """Take the weights at `path`, and start at step 0."""
        load_weights(Path(path), self.run.model, self.checkpoints.tensors(only=["model"]), open_foreign)
        self._take_over_weights()

    def close(self) -> None:
        """Let go of model and groups, in a process that goes on; the session is of no use afterwards."""
        self.trainable.release()

    def _take_over_weights(self) -> None:
        """Give the optimizer's fp32 weights the value of the model's."""
        self.optimizer.reload_model_params()

    def _register_states(self) -> None:
        """Say what a checkpoint of this run holds."""
        register = self.checkpoints.register
        register("model", tensors=self.trainable.saved_weights)
        if self.base is not None:
            register("base", scalars=self.base.record, restore=self.base.check)
        if self.reference is not None:
            register("reference", scalars=self.reference.record, restore=self.reference.restore)
        register(
            "optimizer",
            tensors=lambda: optimizer_shards(self.chunks, self.optimizer),
            scalars=lambda: {"optimizer_steps": optimizer_steps(self.optimizer)},
            restore=lambda saved: set_optimizer_steps(self.optimizer, saved["optimizer_steps"]),
        )
        participants = self.trainable.participants
        register("participants", tensors=lambda: [shard for one in participants for shard in one.state()])
        register("progress", scalars=self._progress, restore=self._restore_progress)
        for hook in self.hooks:
            if hook.name:
                register(hook.name, scalars=hook.state, restore=hook.restore)

    def _progress(self) -> dict[str, Any]:
        at = self.stream.position()
        place: dict[str, Any] = {"position": {"stage": at.stage, "source_samples": list(at.sources)}}
        if self.plan.order == 2:
            # Sources and stages may be others when the run goes on: the record knows them by name.
            place = {"plan": to_json(self.plan.progress(at.samples))}
        return {
            "iteration": self.state.iteration,
            "consumed_samples": at.samples,
            **place,
            "schedule_end": schedule_end(self.run, self.plan, self.state.iteration),
            "data": self.state.data,
        }

    def _restore_progress(self, saved: Mapping[str, Any]) -> None:
        self.state = TrainingState(saved["iteration"], saved["consumed_samples"], data=tuple(saved["data"]))
        # Older checkpoints have the number of samples alone, from which the rest follows.
        place = saved.get("position", {"stage": 0, "source_samples": []})
        samples = saved["consumed_samples"]
        self.stream.seek(Position(samples, place["stage"], tuple(place["source_samples"])))
        if "plan" in saved:
            expected = to_json(self.plan.progress(samples))["sources"]
            if saved["plan"]["sources"] != expected:
                raise ValueError(f"of {samples} samples {saved['plan']['sources']} were read, by the plan {expected}")


def starting_state(run: RunConfig) -> TrainingState:
    """Where a run will go on: the state of its newest checkpoint, or the beginning."""
    newest = find_checkpoint(run.checkpoint.directory)
    return read_state(newest) if newest is not None else TrainingState()


def _checkpoints_of(run: RunConfig, device: torch.device) -> CheckpointManager:
    return CheckpointManager(
        run.checkpoint.directory,
        recorded_run(run, run.model.rotary_base),
        tokenizer=Path(run.data.tokenizer),
        retention=retention_of(run.checkpoint),
        second_place=SecondPlace(run.checkpoint.copy_to) if run.checkpoint.copy_to is not None else None,
        rank_state=RankState(lambda: random_state(device), lambda saved: restore_random_state(saved, device)),
        asynchronous=run.checkpoint.async_save,
    )


def open_session(
    run: RunConfig,
    layout: Layout,
    groups: Groups,
    device: torch.device,
    stream: DataStream,
    plan: RunPlan,
    *,
    open_foreign: OpenForeign = no_foreign_weights,
    hooks: Sequence[Hook] = (),
    guard: Guard | None = None,
) -> Session:
    """Build the model and optimizer with fresh weights, or those that the run continues or starts from.

    Args:
        stream: what it trains on; it is put to where the run goes on.
        plan: that of `stream`.
        open_foreign: opens weights to start from that are no Megatron checkpoint.
        hooks: their state is saved and restored with the rest.
        guard: decides whether a step is taken; one of the hooks. Without one, the first bad step ends the run.
    """
    trainable, task = build_trainable(run, groups, device), task_of(run.task, run.model, groups, run.adapters)
    checkpoints = _checkpoints_of(run, device)
    judged: dict[str, Any] = {} if guard is None else {"judge": guard, "rate_factor": guard.rate_factor}
    base = FrozenBase(run, trainable, open_foreign, device) if trainable.has_frozen_base else None
    reference = None
    if isinstance(task, Preference) and task.reference == "file":
        reference = StoredReference(run)
    kept: dict[str, Any] = {"base": base, "reference": reference}
    session = Session(run, layout, groups, device, trainable, task, stream, plan, checkpoints, hooks, **judged, **kept)
    if (checkpoint := checkpoints.newest()) is not None:
        session.resume(checkpoint)
    elif base is None and run.checkpoint.initialize_from is not None:
        session.initialize_from(run.checkpoint.initialize_from, open_foreign)
    require_directions(routers(session.chunks))
    if isinstance(task, Preference) and reference is not None:
        session.task = dataclasses.replace(task, table=reference.table(session))
    return session
