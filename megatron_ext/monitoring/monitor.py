"""Reports of a run: one line a step on the console, everything in the metrics file and in W&B. Only rank 0 has one."""

import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.config import Layout, RunConfig, to_mapping
from megatron_ext.data.stream.plan import RunPlan
from megatron_ext.data.stream.position import Consumption
from megatron_ext.mcore.moe.metrics import ExpertStatistics, LayerHealth
from megatron_ext.monitoring.clock import Clock
from megatron_ext.monitoring.description import describe_start
from megatron_ext.monitoring.events import Event
from megatron_ext.monitoring.metrics_file import METRICS_FILE, MetricsFile
from megatron_ext.monitoring.sources import (
    SourceReport,
    ValidationReport,
    consumption_line,
    step_line,
    step_panels,
    step_values,
    validation_line,
    validation_panels,
    validation_values,
)
from megatron_ext.monitoring.wandb_run import WandbRun
from megatron_ext.planning.amounts import duration, flops, short_number
from megatron_ext.planning.flops import training_flops_per_token

log = logging.getLogger(__name__)


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
    experts: ExpertStatistics | None
    sources: Mapping[str, SourceReport] = field(default_factory=dict)
    """Those that the run has read; what they say is of the time since the report before."""
    steps: int = 1
    """Steps taken since then, of which the sources say the mean; all else is that of the last."""
    stage: str | None = None
    """Of the data; None where the run has one only."""


def metrics_path(run: RunConfig) -> Path:
    """The file that all metrics of `run` go to."""
    return Path(run.logging.metrics_file or Path(run.checkpoint.directory) / METRICS_FILE)


class Monitor:
    """Receives reports and hands them on, with the throughput since the last one."""

    def __init__(
        self, run: RunConfig, layout: Layout, plan: RunPlan, iteration: int, run_id: str, clock: Clock
    ) -> None:
        directory = Path(run.checkpoint.directory)
        self._run, self._layout, self._plan, self._clock = run, layout, plan, clock
        self._file = MetricsFile(metrics_path(run), iteration)
        configuration = to_mapping(run)
        self._wandb = WandbRun(run.logging.wandb, run_id, directory, configuration)
        started = {"event": "start", "iteration": iteration, "time": time.time(), "world_size": layout.world_size}
        self._file.write(started | describe_start(run, layout))
        lengths = {stage.sequence_length for stage in plan.stages}
        self._flops = {length: training_flops_per_token(run.model, length, run.adapters) for length in lengths}
        """Of a token, by the sequence length."""
        self._last_iteration, self._last_time = iteration, clock.now()
        self._first: tuple[int, float] | None = None
        """Step and time of the first report: what came before it was warming up."""

    def step(self, report: StepReport) -> None:
        """Report a training step."""
        seconds, rate, tflops = self._throughput(report.iteration)
        record: dict[str, Any] = {
            "iteration": report.iteration,
            **report.losses,
            "learning_rate": report.learning_rate,
            "grad_norm": report.grad_norm,
            "consumed_samples": report.consumed_samples,
            "consumed_tokens": self._plan.tokens_at(report.iteration),
            "planned_tokens": self._plan.total_tokens,
            "supervised_tokens": sum(source.supervised_tokens for source in report.sources.values()),
            "seconds_per_step": seconds,
            "tokens_per_second": rate,
            "tflops_per_device": tflops,
            "memory_bytes": report.memory_bytes,
            "time": time.time(),
        }
        if report.stage is not None:
            record["stage"] = report.stage
        if self._run.logging.peak_tflops:
            record["mfu"] = tflops / self._run.logging.peak_tflops
        log.info(self._line(report, record))
        panels = _grouped(record, report.losses) | step_panels(report.sources) | self._expert_values(report.experts)
        self._wandb.log(panels, report.iteration)
        record["sources"] = step_values(report.sources)
        if report.experts is not None:
            record["moe"] = {str(layer): _health_values(health) for layer, health in report.experts.items()}
        self._file.write(record)

    def validation(self, iteration: int, report: ValidationReport) -> None:
        """Report a validation."""
        log.info("step %d | %s", iteration, validation_line(report))
        record = {"iteration": iteration, "validation_loss": report.loss, "sources": validation_values(report)}
        self._file.write({**record, "time": time.time()})
        self._wandb.log(validation_panels(report), iteration)

    def stage_ended(self, iteration: int, consumption: Consumption) -> None:
        """Say what was read of each source until the end of a stage; nothing where there is one only."""
        if consumption.stage is not None:
            log.info("step %d | stage %s is over: %s", iteration, consumption.stage, consumption_line(consumption))

    def event(self, event: Event) -> None:
        """Note what happened besides steps."""
        log.info("step %d: %s", event.iteration, event.text)
        self._file.write({**event.record(), "time": time.time()})

    def close(self, *, failed: bool = False) -> None:
        """Finish all records."""
        self._file.close()
        self._wandb.close(failed=failed)

    def _throughput(self, iteration: int) -> tuple[float, float, float]:
        """Seconds a step, tokens a second over all devices, model TFLOP/s of one device."""
        now, last = self._clock.now(), self._last_iteration
        elapsed = now - self._last_time
        self._last_iteration, self._last_time = iteration, now
        tokens = self._plan.tokens_at(iteration) - self._plan.tokens_at(last)
        tflops = self._work(last, iteration) / elapsed / self._layout.world_size / 1e12
        return elapsed / max(iteration - last, 1), tokens / elapsed, tflops

    def _work(self, first: int, last: int) -> float:
        """Model FLOPs of the steps from `first` to before `last`, over all devices."""
        work = 0.0
        for stage in self._plan.stages:
            begin, end = max(first, stage.first_step), min(last, stage.first_step + stage.steps)
            if begin < end:
                tokens = self._plan.tokens_at(end) - self._plan.tokens_at(begin)
                work += tokens * self._flops[stage.sequence_length]
        return work

    def _line(self, report: StepReport, record: dict[str, Any]) -> str:
        memory, rate = report.memory_bytes, record["tokens_per_second"]
        parts = [
            f"step {report.iteration}/{self._plan.total_steps}",
            f"stage {report.stage}" if report.stage is not None else "",
            f"loss {report.losses['loss']:.4f}",
            step_line(report.sources, report.steps),
            f"lr {report.learning_rate:.2e}",
            f"norm {report.grad_norm:.3f}",
            f"{short_number(record['consumed_tokens'])} of {short_number(record['planned_tokens'])} tokens",
            f"{rate:,.0f} tok/s" if rate >= 10 else f"{rate:.3g} tok/s",
            f"{flops(record['tflops_per_device'] * 1e12)}/s/device",
            f"{memory / 2**30:,.1f} GiB" if memory >= 2**30 else f"{memory / 2**20:,.0f} MiB",
        ]
        if report.experts:
            parts.append(f"MaxVio {max(health.max_violation for health in report.experts.values()):.2f}")
            if dead := sum(health.dead_experts for health in report.experts.values()):
                parts.append(f"{dead} dead expert{'s' if dead > 1 else ''}")
        if (left := self._time_left(report.iteration, record["seconds_per_step"])) is not None:
            parts.append(f"{duration(left)} left")
        return " | ".join(part for part in parts if part)

    def _time_left(self, iteration: int, seconds_per_step: float) -> float | None:
        """Seconds until the last step of this job, validating and saving as until now; None after it."""
        last = min(self._plan.total_steps, self._run.train.stop_at_iteration or self._plan.total_steps)
        now, done, seconds = time.perf_counter(), self._work(iteration - 1, iteration), seconds_per_step
        if self._first is None:
            self._first = iteration, now
        elif iteration > self._first[0]:
            done, seconds = self._work(self._first[0], iteration), now - self._first[1]
        return self._work(iteration, last) * seconds / done if iteration < last else None

    def _expert_values(self, experts: ExpertStatistics | None) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for layer, health in (experts or {}).items():
            for name, value in _health_values(health).items():
                shown = self._wandb.load(value) if name == "load" else value
                values[f"moe/{name}/layer_{layer:03d}"] = shown
        return values


def _health_values(health: LayerHealth) -> dict[str, Any]:
    """What is reported of a MoE layer, by name."""
    values = dataclasses.asdict(health)
    losses = values.pop("losses")
    return {**values, "max_violation": health.max_violation, "dead_experts": health.dead_experts, **losses}


def _grouped(record: Mapping[str, Any], losses: Mapping[str, float]) -> dict[str, Any]:
    """Metrics under the groups that W&B makes panels of."""
    groups = {
        "train": (
            *losses,
            "learning_rate",
            "grad_norm",
            "consumed_samples",
            "consumed_tokens",
            "planned_tokens",
            "supervised_tokens",
            "stage",
        ),
        "throughput": ("seconds_per_step", "tokens_per_second", "tflops_per_device", "mfu", "memory_bytes"),
    }
    return {f"{group}/{name}": record[name] for group, names in groups.items() for name in names if name in record}
