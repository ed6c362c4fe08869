"""The numbers behind the page's plots, few enough to be drawn at once whatever a run's length."""

import base64
import math
from collections.abc import Sequence
from typing import Any

from megatron_ext.monitoring.events import Event
from megatron_ext.monitoring.report.evaluations import evaluation_data
from megatron_ext.monitoring.report.phases import Phase
from megatron_ext.monitoring.report.sources import has_sources, source_data, stretches

MOST_POINTS = 2000
"""Points of a curve: about as many as a screen has columns."""
MOST_COLUMNS = 400
"""Columns of a heat map."""
_MOST_CELLS = 1_500_000
"""Cells of all heat maps of a run: with 70 layers of 128 experts, 167 columns and 2 MB."""
_MOST_HEALTH = 300_000
"""Points of all curves of a run's MoE layers."""
_MOST_EVENTS = 1000
"""Events of a run that are marked: the most serious ones, of those the newest."""
LOAD_UNIT = 64
"""A load is one byte: an even share is this, and about four times as much the most that is told apart."""

CURVES = {
    "loss": "loss (nats a token)",
    "perplexity": "perplexity",
    "rewards/accuracies": "share of pairs told apart",
    "rewards/margins": "margin: reward of chosen - of rejected",
    "rewards/chosen": "reward of the chosen answer (below 0 in most runs)",
    "rewards/rejected": "reward of the rejected answer",
    "logps/chosen": "log-probability of the chosen answer",
    "logps/rejected": "log-probability of the rejected answer",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens / s",
    "tflops_per_device": "TFLOP/s a device",
    "mfu": "MFU",
    "memory_bytes": "peak memory (GiB)",
    "memory_allocated_bytes": "allocated memory (GiB)",
    "memory_reserved_bytes": "reserved memory (GiB)",
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
_SCALE = dict.fromkeys(("memory_bytes", "memory_allocated_bytes", "memory_reserved_bytes"), 2.0**-30)


_SERIOUS = ("info", "warning", "error")


def plot_data(phases: Sequence[Phase]) -> dict[str, Any]:
    """All that the page draws, as JSON: the curves' names, and for each phase its points."""
    health = {name: label for phase in phases for name, label in _health(phase).items()}
    fastest = max((step["tflops_per_device"] for phase in phases for step in phase.steps), default=0.0)
    scales, curves = dict(_SCALE), dict(CURVES)
    if fastest < 1:
        scales["tflops_per_device"], curves["tflops_per_device"] = 1e3, "GFLOP/s a device"
    curves |= {
        name: name.replace("_", " ") for phase in phases for step in phase.steps[-1:] for name in step["figures"]
    }
    drawn = [_phase_data(phase, scales) for phase in phases]
    return {"curves": curves, "health": health, "load_unit": LOAD_UNIT, "phases": drawn}


def silent(phase: Phase) -> list[str]:
    """What was zero in every layer at every step, and is not drawn."""
    layers = [layer for step in phase.routed for layer in step["moe"].values()]
    return [label for name, label in _health(phase).items() if not any(layer.get(name) for layer in layers)]


def _health(phase: Phase) -> dict[str, str]:
    """What was recorded of MoE layers, and what its plot is called."""
    names = {name: None for step in phase.routed for layer in step["moe"].values() for name in layer}
    return {name: HEALTH.get(name, name.replace("_", " ")) for name in names if name != "load"}


def _phase_data(phase: Phase, scales: dict[str, float]) -> dict[str, Any]:
    steps = thin(phase.steps, MOST_POINTS, "loss", "grad_norm")
    begin = phase.steps[0].get("time")
    data: dict[str, Any] = {
        "name": phase.name,
        "step": [step["iteration"] for step in steps],
        "tokens": [step["consumed_tokens"] for step in steps],
        "hours": [_hours(step, begin) for step in steps],
        "restarts": phase.restarts,
        "events": _events_data(phase),
        "curves": {},
        "validation": {
            "step": [v["iteration"] for v in phase.validations],
            "loss": [_finite(v["validation_loss"]) for v in phase.validations],
        },
    }
    for name in [*CURVES, *steps[-1]["figures"]]:
        scale = scales.get(name, 1.0)
        values = [_finite(step["figures"].get(name, step.get(name)), scale) for step in steps]
        if any(values):
            data["curves"][name] = values
    if parts := {part: None for step in steps for part in step["step_seconds"]}:
        data["seconds"] = {part: [_finite(step["step_seconds"].get(part, 0.0)) for step in steps] for part in parts}
    if (evaluated := evaluation_data(phase))["metrics"]:
        data["evaluated"] = evaluated
    if has_sources(phase):
        data["sources"] = source_data(phase)
    if phase.routed:
        data["experts"] = _experts_data(phase.routed, list(_health(phase)), begin)
    return data


def _experts_data(steps: Sequence[dict[str, Any]], names: Sequence[str], begin: float | None) -> dict[str, Any]:
    layers = sorted(steps[-1]["moe"], key=int)
    cells = sum(len(steps[-1]["moe"][layer]["load"]) for layer in layers)
    most = max(min(MOST_POINTS // 2, _MOST_HEALTH // (len(layers) * len(names))), 50)
    shown = thin(steps, most, "loss")
    health = {}
    for name in names:
        curves = [[_finite(step["moe"][layer].get(name)) for step in shown] for layer in layers]
        if any(any(curve) for curve in curves):
            health[name] = curves
    most = max(min(MOST_COLUMNS, _MOST_CELLS // cells), 50)
    columns = [steps[begin:end] for begin, end in stretches(len(steps), most)]
    return {
        "layers": layers,
        "step": [step["iteration"] for step in shown],
        "tokens": [step["consumed_tokens"] for step in shown],
        "hours": [_hours(step, begin) for step in shown],
        "health": health,
        "load_steps": [column[0]["iteration"] for column in columns],
        "load": {layer: _load_bytes([_relative_load(column, layer) for column in columns]) for layer in layers},
        "num_experts": {layer: len(steps[-1]["moe"][layer]["load"]) for layer in layers},
    }


def _relative_load(steps: Sequence[dict[str, Any]], layer: str) -> list[float]:
    """Mean load of each expert of a layer over `steps`, 1 being an even share."""
    loads = [step["moe"][layer]["load"] for step in steps]
    return [sum(values) / len(loads) * len(loads[0]) for values in zip(*loads, strict=True)]


def _load_bytes(columns: Sequence[Sequence[float]]) -> str:
    """Loads in units of `LOAD_UNIT`, a byte each, column by column, in base64."""
    # In this order: what is no number becomes 0, and what is infinite the most.
    quantized = (round(min(max(0, load * LOAD_UNIT), 255)) for column in columns for load in column)
    return base64.b64encode(bytes(quantized)).decode()


def _events_data(phase: Phase) -> dict[str, list[Any]]:
    """What happened besides steps, in order of steps."""
    levels = [Event(event["event"], 0, "").severity for event in phase.events]
    order = sorted(range(len(levels)), key=lambda i: (_SERIOUS.index(levels[i]), i))
    kept = sorted(order[-_MOST_EVENTS:], key=lambda i: phase.events[i]["iteration"])
    return {
        "step": [phase.events[i]["iteration"] for i in kept],
        "kind": [phase.events[i]["event"] for i in kept],
        "severity": [levels[i] for i in kept],
        "text": [phase.events[i]["text"][:300] for i in kept],
    }


def thin(records: Sequence[dict[str, Any]], most: int, *names: str) -> list[dict[str, Any]]:
    """At most `most` of the records, in order; of each stretch the lowest and highest of each name."""
    if len(records) <= most:
        return list(records)
    kept = {0, len(records) - 1}
    for begin, end in stretches(len(records), max((most - 2) // (2 * len(names)), 1)):
        stretch = range(begin, end)
        for name in names:
            # What is no number counts as the highest: it must be seen.
            values = {i: records[i].get(name) for i in stretch}
            key = {i: v if isinstance(v, int | float) and math.isfinite(v) else math.inf for i, v in values.items()}
            kept |= {min(stretch, key=key.__getitem__), max(stretch, key=key.__getitem__)}
    return [records[i] for i in sorted(kept)]


def _hours(step: dict[str, Any], begin: float | None) -> float | None:
    if begin is None or step.get("time") is None:
        return None
    return round((float(step["time"]) - begin) / 3600, 5)


def _finite(value: Any, scale: float = 1.0) -> float | None:
    """A number that can be drawn, in six digits, or None."""
    try:
        scaled = scale * float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return float(f"{scaled:.6g}") if math.isfinite(scaled) else None
