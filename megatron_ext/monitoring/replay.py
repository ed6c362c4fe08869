"""What a run has reported before, out of its metrics file, for a sink that has lost a part of it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_ext.monitoring.events import EVALUATION, event_panels
from megatron_ext.monitoring.metrics_file import RunHistory, as_recorded, read_history, read_lines, read_starts
from megatron_ext.monitoring.sources import recorded_validation, validation_panels
from megatron_ext.monitoring.step_report import step_panels_of

EVALUATED = f"{EVALUATION}/step"
"""The axis of what is known of a checkpoint later than its step."""
WANDB_RUN = "wandb_run_id"
"""What the record of a start has the W&B run under."""
_TRAINED = ("model", "adapters", "precision", "task", "optimizer", "schedule", "data")
"""Sections that say what is trained, beside `train`; the others say where, how, and what is told of it."""


def late(panels: Mapping[str, Any], evaluated: int) -> dict[str, Any]:
    """What is drawn of the evaluation of the checkpoint at step `evaluated`, wherever the run stands by then."""
    return {**panels, EVALUATED: evaluated}


def replay(metrics: Path, after: int, until: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """What was drawn at the steps above `after` up to `until`, by panel, in the order in which it was reported.

    Args:
        metrics: a metrics file that has each step once.
    """
    at = -1
    for record in read_lines(metrics):
        step, event = record["iteration"], record.get("event")
        if event == EVALUATION:
            step = at  # it is drawn where the run stood
        elif event is None:
            at = step
        if not after < step <= until:
            continue
        if event is not None:
            if panels := event_panels(event, record):
                yield step, late(panels, record["iteration"]) if event == EVALUATION else panels
        elif "loss" in record:
            yield step, step_panels_of(record)
        elif "validation_loss" in record:
            yield step, validation_panels(recorded_validation(record))


def first_with_wandb(metrics: Path) -> int | None:
    """The step at which W&B was on first; None where it never was."""
    begun = (one["iteration"] for one in read_starts(metrics) if _wandb(one).get("mode", "off") != "off")
    return min(begun, default=None)


def wandb_run_of(metrics: Path, configuration: Mapping[str, Any]) -> str | None:
    """The W&B run of a run that is begun anew because it ended before its first checkpoint; None for any other."""
    history = read_history(metrics) if metrics.is_file() else RunHistory()
    if not history.starts or any(event["event"] == "checkpoint" for event in history.events):
        return None
    last = history.starts[-1]
    return last.get(WANDB_RUN) if _trained(last.get("run")) == _trained(as_recorded(configuration)) else None


def _trained(run: Any) -> dict[str, Any] | None:
    """What `run` trains; it may begin anew on fewer nodes, in another layout, or with smaller micro-batches."""
    if not isinstance(run, dict):
        return None
    train = {key: value for key, value in run.get("train", {}).items() if key != "micro_batch_size"}
    return {section: run.get(section) for section in _TRAINED} | {"train": train}


def _wandb(start: dict[str, Any]) -> dict[str, Any]:
    run = start.get("run")
    return run.get("logging", {}).get("wandb", {}) if isinstance(run, dict) else {}
