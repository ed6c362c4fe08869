"""The numbers behind the page's plots, few enough to be drawn at once whatever a run's length."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from megatron_ext.monitoring.report.phases import Phase
from megatron_ext.monitoring.report.sources import has_sources, source_data, stretches

MOST_POINTS = 2000
"""Points of a curve: about as many as a screen has columns."""
MOST_COLUMNS = 400
"""Columns of a heat map."""

CURVES = {
    "loss": "loss (nats a token)",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens / s",
    "tflops_per_device": "TFLOP/s a device",
    "mfu": "MFU",
    "memory_bytes": "memory (GiB)",
    "output_z_loss": "output z-loss",
}
"""Keys of a step's record, and what their axis is called."""
HEALTH = {
    "max_violation": "MaxVio: busiest expert's load / even share - 1",
    "dead_experts": "experts without a token",
    "entropy": "router entropy / ln E",
    "top1": "top-1 probability",
    "max1_max2": "largest / second largest probability",
    "drop_rate": "share of dropped tokens",
}
"""Keys of a MoE layer's record, and what their plot is called; its losses go by their own names."""
_SCALE = {"memory_bytes": 2.0**-30}


def plot_data(phases: Sequence[Phase]) -> dict[str, Any]:
    """All that the page draws, as JSON: the curves' names, and for each phase its points."""
    health = {name: label for phase in phases for name, label in _health(phase).items()}
    fastest = max((step["tflops_per_device"] for phase in phases for step in phase.steps), default=0.0)
    scales, curves = dict(_SCALE), dict(CURVES)
    if fastest < 1:
        scales["tflops_per_device"], curves["tflops_per_device"] = 1e3, "GFLOP/s a device"
    return {"curves": curves, "health": health, "phases": [_phase_data(phase, scales) for phase in phases]}


def silent(phase: Phase) -> list[str]:
    """What was zero in every layer at every step, and is not drawn."""
    layers = [layer for step in phase.steps for layer in (step.get("moe") or {}).values()]
    return [label for name, label in _health(phase).items() if not any(layer.get(name) for layer in layers)]


def _health(phase: Phase) -> dict[str, str]:
    """What was recorded of MoE layers, and what its plot is called."""
    names = {name: None for step in phase.steps for layer in (step.get("moe") or {}).values() for name in layer}
    return {name: HEALTH.get(name, name.replace("_", " ")) for name in names if name != "load"}


def _phase_data(phase: Phase, scales: dict[str, float]) -> dict[str, Any]:
    steps = thin(phase.steps, MOST_POINTS, lambda step: step["loss"])
    begin = phase.steps[0].get("time")
    data: dict[str, Any] = {
        "name": phase.name,
        "step": [step["iteration"] for step in steps],
        "tokens": [step["consumed_tokens"] for step in steps],
        "hours": [_hours(step, begin) for step in steps],
        "restarts": phase.restarts,
        "curves": {},
        "validation": {
            "step": [v["iteration"] for v in phase.validations],
            "loss": [_finite(v["validation_loss"]) for v in phase.validations],
        },
    }
    for name in CURVES:
        values = [_finite(step.get(name)) for step in steps]
        if any(values):
            scale = scales.get(name, 1.0)
            data["curves"][name] = [None if value is None else value * scale for value in values]
    if has_sources(phase):
        data["sources"] = source_data(phase)
    routed = [step for step in phase.steps if step.get("moe")]
    if routed:
        data["experts"] = _experts_data(routed, list(_health(phase)), begin)
    return data


def _experts_data(steps: Sequence[dict[str, Any]], names: Sequence[str], begin: float | None) -> dict[str, Any]:
    layers = sorted(steps[-1]["moe"], key=int)
    shown = thin(steps, MOST_POINTS // 2, lambda step: step["loss"])
    health = {}
    for name in names:
        curves = [[_finite(step["moe"][layer].get(name)) for step in shown] for layer in layers]
        if any(any(curve) for curve in curves):
            health[name] = curves
    columns = [steps[begin:end] for begin, end in stretches(len(steps), MOST_COLUMNS)]
    return {
        "layers": layers,
        "step": [step["iteration"] for step in shown],
        "tokens": [step["consumed_tokens"] for step in shown],
        "hours": [_hours(step, begin) for step in shown],
        "health": health,
        "load_steps": [column[0]["iteration"] for column in columns],
        "load": {layer: [_relative_load(column, layer) for column in columns] for layer in layers},
    }


def _relative_load(steps: Sequence[dict[str, Any]], layer: str) -> list[float]:
    """Mean load of each expert of a layer over `steps`, 1 being an even share."""
    loads = [step["moe"][layer]["load"] for step in steps]
    return [round(sum(values) / len(loads) * len(loads[0]), 3) for values in zip(*loads, strict=True)]


def thin(
    records: Sequence[dict[str, Any]], most: int, value: Callable[[dict[str, Any]], float]
) -> list[dict[str, Any]]:
    """At most `most` of the records, in order; of each stretch the lowest and the highest, so that no spike is lost."""
    if len(records) <= most:
        return list(records)
    kept = {0, len(records) - 1}
    for begin, end in stretches(len(records), most // 2 - 1):
        stretch = range(begin, end)
        # What is no number counts as the highest: it must be seen.
        key = {i: v if math.isfinite(v := value(records[i])) else math.inf for i in stretch}
        kept |= {min(stretch, key=key.__getitem__), max(stretch, key=key.__getitem__)}
    return [records[i] for i in sorted(kept)]


def _hours(step: dict[str, Any], begin: float | None) -> float | None:
    if begin is None or step.get("time") is None:
        return None
    return round((float(step["time"]) - begin) / 3600, 5)


def _finite(value: Any) -> float | None:
    """A number that can be drawn, or None."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None
