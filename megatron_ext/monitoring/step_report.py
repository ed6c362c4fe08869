"""One report of training: what the ranks know of a step, and what every sink is given of it."""

import dataclasses
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_ext.monitoring.sources import SourceReport, perplexity, step_panels, step_values

if TYPE_CHECKING:  # sinks need neither torch nor megatron
    from megatron_ext.data.stream.plan import RunPlan
    from megatron_ext.mcore.moe.metrics import ExpertStatistics, LayerHealth
    from megatron_ext.monitoring.throughput import Throughput


@dataclass(frozen=True)
class StepReport:
    """What one report says."""

    iteration: int
    """Steps done."""
    losses: Mapping[str, float]
    """What the task sums up, by name; `loss`, by which the run is judged, among them."""
    learning_rate: float
    grad_norm: float
    consumed_samples: int
    memory_bytes: int
    """Peak memory of the process that used most: device memory on CUDA, resident memory on CPU."""
    experts: "ExpertStatistics | None"
    sources: Mapping[str, SourceReport] = field(default_factory=dict)
    """Those that the run has read; what they say is of the time since the report before."""
    steps: int = 1
    """Steps taken since then, of which the sources say the mean; all else is that of the last."""
    stage: str | None = None
    """Of the data; None where the run has one only."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """More of the memory, by name, in bytes, on the rank that uses most of each."""
    step_seconds: Mapping[str, float] = field(default_factory=dict)
    """What a step took on rank 0 by its parts, in seconds; the mean over the time since the report before."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What the hooks add, by name."""
    has_perplexity: bool = True
    """Whether the loss is a mean cross-entropy."""


@dataclass(frozen=True)
class StepRecord:
    """A report as sinks are given it."""

    report: StepReport
    values: Mapping[str, Any]
    """The line of the metrics file, ready for JSON."""
    last: int
    """The last step of the run."""
    seconds_left: float | None
    """Until the last step of this job; None after it."""


def step_record(
    report: StepReport, plan: "RunPlan", throughput: "Throughput", last: int, left: float | None
) -> StepRecord:
    """`report` with what follows from it and the throughput."""
    values: dict[str, Any] = {
        "iteration": report.iteration,
        **report.losses,
        **({"perplexity": perplexity(report.losses["loss"])} if report.has_perplexity else {}),
        "learning_rate": report.learning_rate,
        "grad_norm": report.grad_norm,
        "consumed_samples": report.consumed_samples,
        "consumed_tokens": plan.tokens_at(report.iteration),
        "planned_tokens": plan.total_tokens,
        "supervised_tokens": sum(source.supervised_tokens for source in report.sources.values()),
        "seconds_per_step": throughput.seconds_per_step,
        "tokens_per_second": throughput.tokens_per_second,
        "tflops_per_device": throughput.tflops_per_device,
        "memory_bytes": report.memory_bytes,
        **{f"memory_{name}_bytes": used for name, used in report.memory.items()},
        "time": time.time(),
    }
    if throughput.mfu is not None:
        values["mfu"] = throughput.mfu
    if report.stage is not None:
        values["stage"] = report.stage
    if report.step_seconds:
        values["step_seconds"] = dict(report.step_seconds)
    if report.figures:
        values["figures"] = dict(report.figures)
    values["sources"] = step_values(report.sources)
    if report.experts is not None:
        values["moe"] = {str(layer): health_values(health) for layer, health in report.experts.items()}
    return StepRecord(report, values, last, left)


def health_values(health: "LayerHealth") -> dict[str, Any]:
    """What is reported of a MoE layer, by name."""
    values = dataclasses.asdict(health)
    losses = values.pop("losses")
    return {**values, "max_violation": health.max_violation, "dead_experts": health.dead_experts, **losses}


_GROUPS = {
    "train": (
        "perplexity",
        "learning_rate",
        "grad_norm",
        "consumed_samples",
        "consumed_tokens",
        "planned_tokens",
        "supervised_tokens",
        "stage",
    ),
    "throughput": ("seconds_per_step", "tokens_per_second", "tflops_per_device", "mfu"),
}


def step_panels_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is drawn of a report, under the groups that W&B and TensorBoard make panels of.

    A number each, but for `train/stage`, a text, and `moe/load/layer_...`, the share of each expert.

    Args:
        values: a line of the metrics file, as it is written or as it was read again.
    """
    # The sums of the task stand between the step and the learning rate, where `step_record` puts them.
    sums = list(itertools.takewhile(lambda name: name != "learning_rate", values))
    panels: dict[str, Any] = {f"train/{name}": values[name] for name in sums if name not in ("iteration", "perplexity")}
    for group, names in _GROUPS.items():
        panels |= {f"{group}/{name}": values[name] for name in names if name in values}
    panels |= {f"throughput/{name}": used for name, used in values.items() if name.startswith("memory_")}
    panels |= {f"step_seconds/{part}": seconds for part, seconds in values.get("step_seconds", {}).items()}
    panels |= {f"run/{name}": figure for name, figure in values.get("figures", {}).items()}
    panels |= step_panels(values.get("sources", {}))
    for layer, health in values.get("moe", {}).items():
        panels |= {f"moe/{name}/layer_{int(layer):03d}": value for name, value in health.items()}
    return panels
