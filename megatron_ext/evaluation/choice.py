"""Chooses among the checkpoints of a run by a written rule: ranks in metrics that are to be low or high."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ext.errors import DataError
from megatron_ext.monitoring.events import EVALUATION
from megatron_ext.monitoring.kept_results import kept_results
from megatron_ext.monitoring.metrics_file import METRICS_FILE, read_history
from megatron_ext.monitoring.report.records import numbers_of

Results = Mapping[int, Mapping[str, float]]
"""Metrics by name, by the step of a checkpoint."""


@dataclass(frozen=True)
class Choice:
    """The checkpoints in order, the chosen one first."""

    ranks: dict[int, float]
    """Mean rank over the metrics of the rule, 1 being best in all; equal values share their ranks."""
    left_out: tuple[int, ...]
    """Checkpoints that lack a metric of the rule."""

    @property
    def best(self) -> int:
        """The step of the chosen one."""
        return next(iter(self.ranks))


def evaluated_results(run: str | Path) -> dict[int, dict[str, float]]:
    """What is known of a run's checkpoints: evaluations beside it and by hand, and validations of the same steps.

    Raises:
        DataError: there is no metrics file, or no checkpoint was evaluated.
    """
    path = Path(run) / METRICS_FILE if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise DataError(f"{path}: no metrics file here; give a run's checkpoint directory, or its metrics.jsonl")
    history = read_history(path)
    found = {step: numbers_of(metrics) for step, metrics in kept_results(path.parent).items()}
    for event in history.events:
        if event["event"] == EVALUATION and isinstance(results := event.get("results"), dict):
            numbers = {n: float(v) for n, v in results.items() if isinstance(v, int | float)}
            found.setdefault(event["iteration"], {}).update(numbers)
    if not found:
        raise DataError(
            f"{path}: no checkpoint was evaluated; see evaluation.on_checkpoint, or tools/evaluate.py lm-eval"
        )
    for report in history.reports:
        if "validation_loss" in report and report["iteration"] in found:
            found[report["iteration"]]["validation_loss"] = float(report["validation_loss"])
    return dict(sorted(found.items()))


def choose(results: Results, rule: Mapping[str, Literal["min", "max"]]) -> Choice:
    """Rank the checkpoints: by the mean of their ranks in each metric of `rule`; of equal ones the later is better.

    Raises:
        DataError: no checkpoint has all metrics of the rule.
    """
    whole = [step for step, metrics in results.items() if all(name in metrics for name in rule)]
    if not whole:
        known = ", ".join(dict.fromkeys(name for metrics in results.values() for name in metrics))
        raise DataError(f"no checkpoint has all of {', '.join(rule)}; there are: {known}")
    sums = dict.fromkeys(whole, 0.0)
    for name, wanted in rule.items():
        values = [results[step][name] if wanted == "min" else -results[step][name] for step in whole]
        for step, rank in zip(whole, _ranks(values), strict=True):
            sums[step] += rank / len(rule)
    order = sorted(whole, key=lambda step: (sums[step], -step))
    return Choice({step: sums[step] for step in order}, tuple(step for step in results if step not in sums))


def _ranks(values: Sequence[float]) -> list[float]:
    """1 for the lowest; equal values have the mean of their ranks; what is no number is last."""
    keys = [(value != value, 0.0 if value != value else value) for value in values]
    return [1 + sum(other < key for other in keys) + (sum(other == key for other in keys) - 1) / 2 for key in keys]
