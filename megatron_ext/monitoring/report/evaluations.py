"""What evaluations found, beside a run or by hand: checkpoints and metrics, and what the newest ones write."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.monitoring.events import EVALUATION
from megatron_ext.monitoring.report.phases import Phase
from megatron_ext.monitoring.report.records import numbers_of

INTERVAL = "_interval"
"""What the name of half of a metric's interval of 95 % ends with, behind that of the metric."""
SAMPLES_FILE = "samples.json"
"""In the folder of an evaluation: prompts and continuations."""
_MOST_CHECKPOINTS, _MOST_SHOWN, _MOST_PROMPTS = 100, 4, 20
_MOST_CURVES = 60


def evaluations(phase: Phase) -> dict[int, dict[str, float]]:
    """The results for each checkpoint, by its step; of one that was evaluated twice beside the run, the last."""
    beside = {
        event["iteration"]: numbers_of(event.get("results")) for event in phase.events if event["event"] == EVALUATION
    }
    return {step: phase.kept.get(step, {}) | beside.get(step, {}) for step in sorted({*phase.kept, *beside})}


def evaluation_data(phase: Phase) -> dict[str, Any]:
    """All that is drawn of evaluations, ready for JSON: steps, each metric of two or more, half of its interval."""
    found = evaluations(phase)
    names = list(dict.fromkeys(name for metrics in found.values() for name in metrics if not name.endswith(INTERVAL)))
    metrics: dict[str, dict[str, list[float | None]]] = {}
    for name in names[:_MOST_CURVES]:
        values = [metrics_of_one.get(name) for metrics_of_one in found.values()]
        halves = [metrics_of_one.get(name + INTERVAL) for metrics_of_one in found.values()]
        if sum(value is not None for value in values) > 1:
            metrics[name] = {"value": values} | ({"half": halves} if any(h is not None for h in halves) else {})
    return {"step": list(found), "metrics": metrics}


def evaluation_table(phase: Phase) -> tuple[list[str], list[list[str]]]:
    """Header, and a row for each of the newest checkpoints."""
    steps = list(evaluations(phase).items())[-_MOST_CHECKPOINTS:]
    return result_table(dict(steps))


def result_table(results: Mapping[int, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Header, and a row for each checkpoint: its step and its metrics, with their intervals where there are such."""
    names = [name for metrics in results.values() for name in metrics if not name.endswith(INTERVAL)]
    names, rows = list(dict.fromkeys(names)), []
    for step, metrics in results.items():
        cells = [f"{step:,}"]
        for name in names:
            half = metrics.get(name + INTERVAL)
            around = "" if half is None else f" ± {half:.2g}"
            cells.append(f"{metrics[name]:.4g}{around}" if name in metrics else "-")
        rows.append(cells)
    return ["checkpoint", *names], rows


def sample_table(phase: Phase) -> tuple[list[str], list[list[str]]]:
    """Header, and a row for each prompt with what the newest checkpoints write; no rows where nothing was kept."""
    folders = {event["iteration"]: event.get("folder") for event in phase.events if event["event"] == EVALUATION}
    read = [(step, _samples(folder)) for step, folder in sorted(folders.items())]
    shown = [(step, samples) for step, samples in read[-_MOST_SHOWN:] if samples]
    prompts = list(dict.fromkeys(prompt for _, samples in shown for prompt in samples))[:_MOST_PROMPTS]
    rows = [[prompt, *(samples.get(prompt, "-") for _, samples in shown)] for prompt in prompts]
    return ["prompt", *(f"step {step:,}" for step, _ in shown)], rows


def _samples(folder: Any) -> dict[str, str]:
    """Continuations by their prompts; none where there is no such file any more."""
    try:
        rows: Sequence[Any] = json.loads((Path(folder) / SAMPLES_FILE).read_text(encoding="utf-8"))
        return {str(row["prompt"]): str(row["continuation"]) for row in rows}
    except (OSError, ValueError, TypeError, KeyError):
        return {}
