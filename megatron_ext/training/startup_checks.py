"""What a run finds on this machine, looked at before anything starts: files, what it goes on from, room on the disk."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.both_places import Ahead, ahead_of
from megatron_ext.checkpoint.find import complete_checkpoints, find_checkpoint, iteration_of, require_checkpoint
from megatron_ext.checkpoint.publish import in_the_way
from megatron_ext.checkpoint.state_file import TrainingState, read_state, require_whole_model
from megatron_ext.checkpoint.tokenizer_files import TOKENIZER_FOLDER, has_tokenizer
from megatron_ext.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_ext.config.load import raise_faults, read_run_text, values_of
from megatron_ext.config.rules.stages import can_be_planned
from megatron_ext.data.stream.make_plan import SourceSize
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import CheckpointError, ConfigError, DataError, named
from megatron_ext.monitoring.alerts.environment import missing_secrets
from megatron_ext.monitoring.monitor import metrics_path
from megatron_ext.monitoring.sinks.tensorboard import require_tensorboard
from megatron_ext.planning.amounts import size
from megatron_ext.planning.check import describe_run
from megatron_ext.planning.epochs import MANY_EPOCHS, source_uses
from megatron_ext.planning.room import bytes_on_disk, checkpoints_to_come, saved_steps
from megatron_ext.runtime.cpu_speed import slow_precision
from megatron_ext.training.data_files import DataFiles, collecting
from megatron_ext.training.findings import Findings
from megatron_ext.training.lost_run import begins_anew
from megatron_ext.training.planned import plan_data, stated_plan, with_planned_length
from megatron_ext.training.same_run import (
    changed_keys,
    check_holds_weights,
    check_models_agree,
    check_same_adapters,
    check_same_data,
    check_same_model,
    check_same_sources,
    check_same_task,
    rereads,
    trained_model,
)
from megatron_ext.training.schedule_faults import moved_decay
from megatron_ext.training.start import OpenForeign, foreign_model


def check_run(
    path: str, overrides: Sequence[str], world_size: int | None, *, files: bool, open_foreign: OpenForeign
) -> str:
    """What `--check` prints of the run at `path`; nothing is started and nothing written.

    Args:
        world_size: processes; None takes the fewest the layout needs.
        files: look at data, checkpoints and disk too, not only at the configuration.
        open_foreign: opens weights to start from that are no Megatron checkpoint.

    Raises:
        ConfigError: naming every fault of the configuration and of the files it names.
    """
    text = read_run_text(path, overrides)
    faults, description = list(text.faults), ""
    found = examine(text.values, text.run, open_foreign) if files else Findings()
    if text.run is not None:
        try:
            if not files and (plan := stated_plan(text.run.data, text.run.train)) is not None:
                found.note_plan(plan, text.run.data, with_planned_length(text.run, plan))
            description = describe_run(text.run, world_size, found.plan)
        except ConfigError as error:
            faults += str(error).splitlines()  # of the layout there may be several
    raise_faults(path, faults + found.faults)
    return "\n".join([description, *found.lines()])


def examine_run(run: RunConfig, source: str, open_foreign: OpenForeign) -> Findings:
    """`examine` a run that starts now.

    Raises:
        ConfigError: naming every fault. `source` is where the run is from.
    """
    found = examine(values_of(run), run, open_foreign)
    raise_faults(source, found.faults)
    return found


def examine(values: Mapping[str, Any], run: RunConfig | None, open_foreign: OpenForeign) -> Findings:
    """Look at everything on the disk that the keys in `values` name.

    Args:
        values: every valid value and section of the run's configuration, by name.
        run: the whole, where nothing is wrong with it.
        open_foreign: opens weights to start from that are no Megatron checkpoint.
    """
    examination = _Examination(values, run, open_foreign)
    examination.look()
    return examination.found


class _Examination:
    """Looks at one thing after the other, with whatever keys are there for it."""

    def __init__(self, values: Mapping[str, Any], run: RunConfig | None, open_foreign: OpenForeign) -> None:
        self.found = Findings()
        self._values, self._run, self._open_foreign = values, run, open_foreign
        self._model: ModelConfig | None = values.get("model")
        self._data: DataConfig | None = values.get("data")
        self._train: TrainConfig | None = values.get("train")
        self._checkpoint: CheckpointConfig | None = values.get("checkpoint")
        self._tokenizer: Tokenizer | None = None
        self._fingerprints: list[str] | None = None
        self._state = TrainingState()
        self._ahead: Ahead | None = None
        """What the run brings back from its second place, to go on from there."""

    def look(self) -> None:
        """Look at everything."""
        self._look_at_tokenizer()
        sizes = self._look_at_data()
        with collecting(self.found.faults):
            if self._checkpoint is not None:
                self._ahead = ahead_of(Path(self._checkpoint.directory), self._checkpoint.copy_to)
            self._look_at_state()
            if sizes is not None:
                self._plan(sizes)
        if self._checkpoint is not None:
            with collecting(self.found.faults):
                self._look_at_start(self._checkpoint)
            self._look_at_folders()
        self._look_at_monitoring()
        if sizes is not None:
            self._count_epochs([size.tokens for size in sizes.values()])
        if self._run is not None:
            self._look_at_room(self._run)
            if slow := slow_precision(self._run.runtime, self._run.precision):
                self.found.warnings.append(slow)

    def _look_at_tokenizer(self) -> None:
        if (directory := self._values.get("data.tokenizer")) is None:
            return
        with collecting(self.found.faults, "data.tokenizer", directory):
            self._tokenizer = Tokenizer(directory)
            rows = self._values.get("model.vocab_size")
            if rows is not None and self._tokenizer.vocab_size > rows:
                raise DataError(
                    f"it has {self._tokenizer.vocab_size} tokens, more than model.vocab_size = {rows}; raise that"
                )

    def _look_at_data(self) -> dict[str, SourceSize] | None:
        """Size of each source that is trained on, by id; None where one is not as it must be."""
        files = DataFiles(self._values, self._tokenizer, self.found.faults)
        sizes = files.look()
        self.found.sums, self.found.packed = files.sums, files.packed
        self.found.warnings += files.warnings
        if sizes is not None:
            self._fingerprints = [size.fingerprint for size in sizes.values()]
        return sizes

    def _plan(self, sizes: Mapping[str, SourceSize]) -> None:
        """Plan the data, as far as the configuration is right."""
        if self._data is None or self._train is None or not can_be_planned(self._data, self._train):
            return
        with collecting(self.found.faults):
            where = self._newest()
            try:
                plan = plan_data(self._data, self._train, sizes, self._state, where or "the beginning")
            except ConfigError as error:
                self.found.faults += str(error).splitlines()
                return
            if self._run is not None:
                self._run = with_planned_length(self._run, plan)
                self._train = self._run.train
            self.found.note_plan(plan, self._data, self._run)

    def _look_at_state(self) -> None:
        """Read where the run goes on, if it does."""
        if (newest := self._newest()) is not None:
            self._state = read_state(newest)

    def _newest(self) -> Path | None:
        """What is in the run's directory to go on from; None too where the run brings something newer back."""
        if self._checkpoint is None or self._ahead is not None:
            return None
        return find_checkpoint(self._checkpoint.directory)

    def _look_at_start(self, checkpoint: CheckpointConfig) -> None:
        """Find what the run would go on or start from."""
        if self._ahead is not None:
            self.found.start = f"{self._ahead.place.url}/{self._ahead.name}, which is brought back: {self._ahead.why}"
            return
        if (newest := self._newest()) is not None:
            self._look_at_resume(newest)
            if self._run is not None and self._run.adapters is not None:
                self._look_at_base(str(checkpoint.initialize_from))
            return
        self._look_at_what_is_left(Path(checkpoint.directory))
        if checkpoint.initialize_from is not None:
            with collecting(self.found.faults, "checkpoint.initialize_from", checkpoint.initialize_from):
                self._look_at_weights(Path(checkpoint.initialize_from))
        else:
            self.found.start = "a new run, from fresh weights"

    def _look_at_what_is_left(self, directory: Path) -> None:
        """Note what an earlier start has left of a run that begins anew."""
        if self._run is not None:
            with collecting(self.found.faults):
                if (said := begins_anew(directory, metrics_path(self._run))) is not None:
                    self.found.warnings.append(f"{directory}: {said}")

    def _look_at_resume(self, newest: Path) -> None:
        done, faults = self._state.iteration, self.found.faults
        steps = f" of {self._train.train_iters}" if self._train is not None else ""
        self.found.start = f"continues {newest} at step {done}{steps}"
        if self._model is not None:
            with collecting(faults):
                check_same_model(trained_model(self._model, self._state, newest), newest)
        if self._data is not None and self._train is not None and self._state.consumed_samples:
            with collecting(faults):
                # A section with a fault of its own is not among the values.
                if (task := self._values.get("task")) is not None and "adapters" in self._values:
                    check_same_task(task, newest, has_adapters=self._values["adapters"] is not None)
                check_same_data(self._data, self._train, newest)
            if self._data.order == 1:
                with collecting(faults):
                    check_same_sources(self._fingerprints or self._state.data, self._state, newest)
        if self._run is not None:
            with collecting(faults):
                check_same_adapters(self._run.model, self._run.adapters, newest)
            self.found.changes = changed_keys(self._run, newest)
            if self.found.plan is not None and (moved := moved_decay(self._run, self.found.plan, newest, done)):
                faults.append(moved)
        if self._train is not None and done >= self._train.train_iters:
            self.found.warnings.append(
                f"train.train_iters = {self._train.train_iters}: all of them are done, and this run would do nothing; "
                "raise it to go on, or set another checkpoint.directory"
            )

    def _look_at_base(self, path: str) -> None:
        """Find whether the weights are there beside which the run goes on."""
        start = self.found.start
        with collecting(self.found.faults, "checkpoint.initialize_from", path):
            self._look_at_weights(Path(path))
        self.found.start = f"{start}, beside the weights of {path}"

    def _look_at_weights(self, path: Path) -> None:
        if not path.exists():
            raise CheckpointError("is not there")
        foreign, trained_with = self._open_foreign(path), None
        if foreign is not None:
            trained_with = foreign.run
            checkpoint, tokenizer = foreign.directory, foreign.tokenizer
            if self._model is not None:
                check_models_agree(self._model, foreign_model(foreign, self._model), checkpoint)
        else:
            checkpoint = require_checkpoint(path)
            require_whole_model(checkpoint)
            folder = checkpoint / TOKENIZER_FOLDER
            tokenizer = folder if has_tokenizer(folder) else None
            if self._model is not None:
                check_same_model(self._model, checkpoint)
                check_holds_weights(self._model, checkpoint)
        self.found.start = f"a new run, from the weights of {checkpoint}"
        if tokenizer is not None:
            self._compare_tokenizer(tokenizer)
        if self._data is not None and self._train is not None:
            again = rereads(self._data, self._train, checkpoint, self._fingerprints or [], trained_with)
            self.found.warnings += [again] if again is not None else []

    def _compare_tokenizer(self, other: Path) -> None:
        """Warn where the weights know tokens under other numbers than the data."""
        if self._tokenizer is None:
            return
        faults: list[str] = []
        with collecting(faults, "the tokenizer of checkpoint.initialize_from cannot be read"):
            if Tokenizer(other).fingerprint != self._tokenizer.fingerprint:
                faults.append(
                    f"data.tokenizer = {named(self._tokenizer.directory)} is not {other}, with which the weights of "
                    "checkpoint.initialize_from were trained; if the two number their tokens differently, those "
                    "weights are of little use"
                )
        self.found.warnings += faults

    def _look_at_folders(self) -> None:
        """Note folders that could not be written."""
        metrics = self._values.get("logging.metrics_file")
        folders = {
            "checkpoint.directory": self._values.get("checkpoint.directory"),
            "checkpoint.copy_to": self._values.get("checkpoint.copy_to"),
            "data.cache_dir": self._values.get("data.cache_dir"),
            "logging.metrics_file": str(Path(metrics).parent) if metrics else None,
            "logging.wandb.directory": self._values.get("logging.wandb.directory"),
            "logging.tensorboard_directory": self._values.get("logging.tensorboard_directory"),
        }
        for key, folder in folders.items():
            if folder is None or "://" in folder:
                continue
            place = _existing(Path(folder))
            if not place.is_dir():
                self.found.faults.append(f"{key} = {named(self._values[key])}: {place} is a file, not a folder")
            elif not os.access(place, os.W_OK | os.X_OK):
                self.found.faults.append(f"{key} = {named(self._values[key])}: {place} may not be written by this user")

        if metrics and Path(metrics).is_dir():
            self.found.faults.append(f"logging.metrics_file = {named(metrics)}: is a folder, where a file is written")
        if self._checkpoint is not None:
            self.found.faults += [
                f"checkpoint.directory = {named(self._checkpoint.directory)}: {path.name} is where a save is written, "
                "and was not left by one (a link, or files of yours); move it away"
                for path in in_the_way(Path(self._checkpoint.directory))
            ]

    def _look_at_monitoring(self) -> None:
        """Note what alerts and reports need and is not there."""
        if (alerts := self._values.get("alerts")) is not None:
            self.found.faults += missing_secrets(alerts)
        if self._values.get("logging.tensorboard_directory") is not None:
            with collecting(self.found.faults):
                require_tensorboard()

    def _count_epochs(self, tokens: Sequence[int]) -> None:
        if self._data is None or self._data.stages or self.found.plan is None:
            return
        samples = self.found.plan.total_samples
        self.found.sources = source_uses(self._data.train, tokens, self._data.sequence_length, samples)
        self.found.warnings += [
            f"{use.path} is read {use.epochs:,.3g} times; beyond about {MANY_EPOCHS} epochs repeated data is worth "
            "ever less"
            for use in self.found.sources
            if use.epochs > MANY_EPOCHS
        ]

    def _look_at_room(self, run: RunConfig) -> None:
        """Note whether the checkpoints to come have room on the disk."""
        settings = run.checkpoint
        last = min(run.train.train_iters, run.train.stop_at_iteration or run.train.train_iters)
        done = self._state.iteration
        if last <= done:
            return
        saves = len(saved_steps(settings, done, last))
        there = [iteration_of(path) for path in complete_checkpoints(Path(settings.directory))]
        coming = checkpoints_to_come(settings, done, last, there)
        free = shutil.disk_usage(_existing(Path(settings.directory))).free
        each = bytes_on_disk(run)
        keep = f"keep_last = {settings.keep_last}" if settings.keep_last else "all are kept"
        self.found.room = f"about {size(each)} each, {saves:,} to come ({keep}); {size(free)} are free there"
        where = f"checkpoint.directory = {named(settings.directory)}"
        if each > free:
            self.found.faults.append(
                f"{where}: a checkpoint takes about {size(each)}, but only {size(free)} are free there"
            )
        elif each * coming > free:
            self.found.warnings.append(
                f"{where}: {coming:,} checkpoints of about {size(each)} will stand there ({keep}), but only "
                f"{size(free)} are free; set a smaller checkpoint.keep_last, or make room"
            )
        if settings.copy_to is not None and "://" not in settings.copy_to:
            second = Path(settings.copy_to)
            free = shutil.disk_usage(_existing(second)).free
            coming = checkpoints_to_come(
                settings, done, last, [iteration_of(path) for path in complete_checkpoints(second)]
            )
            if each * coming > free:
                self.found.warnings.append(
                    f"checkpoint.copy_to = {named(settings.copy_to)}: {coming:,} copies of about {size(each)} will "
                    f"stand there ({keep}), but only {size(free)} are free"
                )


def _existing(path: Path) -> Path:
    """`path`, or the nearest of what stands above it that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())
