"""The training runs of a report, by their metrics files, and one line about each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_ext.errors import DataError, note_path
from megatron_ext.foreign import reading
from megatron_ext.monitoring.kept_results import kept_results
from megatron_ext.monitoring.metrics_file import METRICS_FILE
from megatron_ext.monitoring.report.records import drawable, drawable_events, drawable_starts, numbers_of
from megatron_ext.monitoring.report.run_file import RunFile
from megatron_ext.planning.amounts import flops


@dataclass(frozen=True)
class Phase:
    """One training run of the report, by its metrics file."""

    name: str
    records: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    """What was recorded each time the run was started, or continued."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """What else happened: `event`, `iteration` and `text`."""
    kept: dict[int, dict[str, float]] = field(default_factory=dict)
    """What evaluations by hand found, by the step of the checkpoint."""

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """Reports of training steps."""
        return [record for record in self.records if "loss" in record]

    @cached_property
    def validations(self) -> list[dict[str, Any]]:
        """Reports of validations."""
        return [record for record in self.records if "validation_loss" in record]

    @cached_property
    def routed(self) -> list[dict[str, Any]]:
        """Reports of training steps that say what the experts did."""
        return [step for step in self.steps if step.get("moe")]

    @property
    def tokens(self) -> int:
        """Tokens consumed by the whole phase."""
        return int(self.steps[-1]["consumed_tokens"]) if self.steps else 0

    @property
    def restarts(self) -> list[int]:
        """Steps after which the run was continued."""
        return [int(start["iteration"]) for start in self.starts if start.get("iteration")]


class RunFiles:
    """The runs of a report, read as far as they have come.

    Args:
        entries: `name=metrics.jsonl`, in order; the file may be given by its folder, and then needs no name.

    Raises:
        DataError: two runs have one name.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        self._files: dict[str, tuple[Path, RunFile]] = {}
        for entry in entries:
            name, path = _named_file(entry)
            note_path(str(path))
            if name in self._files:
                raise DataError(f"metrics: two runs are called {name!r}; name them, as in first={path}")
            self._files[name] = path, RunFile(path)

    def update(self) -> bool:
        """Read what is new; whether there was anything.

        Raises:
            DataError: a file cannot be read.
        """
        changed = False
        for path, file in self._files.values():
            with reading(path, DataError, kind="a metrics file"):
                changed |= file.update()
        return changed

    def phases(self) -> list[Phase]:
        """What was read."""
        return [_phase(name, path, file) for name, (path, file) in self._files.items()]


def _phase(name: str, path: Path, file: RunFile) -> Phase:
    history = file.history
    records = drawable(history.reports, str(path))
    kept = {step: numbers_of(metrics) for step, metrics in kept_results(path.parent).items()}
    return Phase(name, records, drawable_starts(history.starts), drawable_events(history.events), kept)


def read_phases(named_files: Sequence[str]) -> list[Phase]:
    """The runs of `named_files`, as `RunFiles` takes them.

    Raises:
        DataError: a file cannot be read or holds no training step, or two runs have one name.
    """
    files = RunFiles(named_files)
    files.update()
    phases = files.phases()
    for entry, phase in zip(named_files, phases, strict=True):
        if not phase.steps:
            raise DataError(f"{_named_file(entry)[1]}: holds no training step")
    return phases


def _named_file(entry: str) -> tuple[str, Path]:
    """Name and metrics file of an entry; without a name the run is called as its folder."""
    name, equals, place = entry.partition("=")
    if not equals or Path(entry).exists():
        name, place = "", entry
    path = Path(place)
    if path.is_dir():
        path /= METRICS_FILE
    return name or path.absolute().parent.name, path


SUMMARY_HEADER = ("phase", "steps", "tokens", "first loss", "last loss", "validation", "tokens/s", "compute/device")


def summary_rows(phases: Sequence[Phase]) -> list[tuple[str, ...]]:
    """One row a phase: name, steps, tokens, first and last loss, last validation loss, median tokens/s and FLOP/s."""
    rows: list[tuple[str, ...]] = []
    for phase in phases:
        if not phase.steps:
            continue
        rates = sorted(step["tokens_per_second"] for step in phase.steps)
        tflops = sorted(step["tflops_per_device"] for step in phase.steps)
        validation = f"{phase.validations[-1]['validation_loss']:.3f}" if phase.validations else "-"
        rows.append(
            (
                phase.name,
                f"{phase.steps[-1]['iteration']}",
                f"{phase.tokens:,}",
                f"{phase.steps[0]['loss']:.3f}",
                f"{phase.steps[-1]['loss']:.3f}",
                validation,
                f"{rates[len(rates) // 2]:,.0f}",
                f"{flops(tflops[len(tflops) // 2] * 1e12)}/s",
            )
        )
    return rows
