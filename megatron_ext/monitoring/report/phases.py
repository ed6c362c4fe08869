"""The training runs of a report, by their metrics files, and one line about each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.errors import DataError, note_path
from megatron_ext.foreign import reading
from megatron_ext.monitoring.metrics_file import METRICS_FILE, read_metrics, read_starts
from megatron_ext.monitoring.report.records import drawable, drawable_starts
from megatron_ext.planning.amounts import flops


@dataclass(frozen=True)
class Phase:
    """One training run of the report, by its metrics file."""

    name: str
    records: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    """What was recorded each time the run was started, or continued."""

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Reports of training steps."""
        return [record for record in self.records if "loss" in record]

    @property
    def validations(self) -> list[dict[str, Any]]:
        """Reports of validations."""
        return [record for record in self.records if "validation_loss" in record]

    @property
    def tokens(self) -> int:
        """Tokens consumed by the whole phase."""
        return int(self.steps[-1]["consumed_tokens"]) if self.steps else 0

    @property
    def restarts(self) -> list[int]:
        """Steps after which the run was continued."""
        return [int(start["iteration"]) for start in self.starts if start.get("iteration")]


def read_phases(named_files: Sequence[str]) -> list[Phase]:
    """Phases from `name=metrics.jsonl` entries, in order; the file may be given by its folder, and then needs no name.

    Raises:
        DataError: a file cannot be read or holds no training step, or two runs have one name.
    """
    phases: list[Phase] = []
    for entry in named_files:
        name, path = _named_file(entry)
        note_path(str(path))
        if any(phase.name == name for phase in phases):
            raise DataError(f"metrics: two runs are called {name!r}; name them, as in first={path}")
        with reading(path, DataError, kind="a metrics file"):
            records, starts = read_metrics(path), read_starts(path)
        phases.append(Phase(name, drawable(records, str(path)), drawable_starts(starts)))
        if not phases[-1].steps:
            raise DataError(f"{path}: holds no training step")
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
