"""What a sink has lost is drawn again from the metrics file exactly as it was drawn first."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config import WandbConfig, to_mapping
from megatron_ext.mcore.moe.metrics import ExpertStatistics, LayerHealth
from megatron_ext.monitoring.clock import Clock
from megatron_ext.monitoring.events import Event
from megatron_ext.monitoring.metrics_file import MetricsFile
from megatron_ext.monitoring.monitor import Monitor, StepReport, new_run_id
from megatron_ext.monitoring.replay import replay
from megatron_ext.monitoring.sinks.wandb import WandbSink
from megatron_ext.monitoring.sources import SourceReport, ValidationReport
from tests.support.minimal_run import load, mapping
from tests.unit.training.plans import plan_of_run

LAYER = LayerHealth([0.4, 0.3, 0.3, 0.0], 0.1, 0.9, 0.5, 2.0, {"aux_loss": 1.1})
SOURCES = {"ja": SourceReport(2.5, 10.0, 640, 0.5), "masked": SourceReport(None, 0.0, 64, 0.1)}


class Drawn:
    """A W&B run that notes what is drawn at each step."""

    dir = "unused"

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def log(self, values: dict[str, Any], *, step: int, commit: bool) -> None:
        assert commit
        self.rows.append((step, {name: getattr(value, "histogram", value) for name, value in values.items()}))

    def finish(self, *, exit_code: int) -> None:
        """Nothing is open."""


def step(iteration: int, **others: Any) -> StepReport:
    sums = {"loss": 2.5 / iteration, "output_z_loss": 0.125, "rewards/margins": -1.5}
    return StepReport(iteration, sums, 1e-3, 0.7, iteration * 8, 3 * 2**20, None, **others)


def test_what_is_replayed_is_what_was_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load(mapping(checkpoint={"directory": str(tmp_path)}, logging={"peak_tflops": 1e-3}))
    monitor = Monitor(run, run.resolve(1), plan_of_run(run), 0, "abcd1234", Clock())
    drawn, again = runs = Drawn(), Drawn()
    left = iter(runs)
    monkeypatch.setattr("megatron_ext.monitoring.sinks.wandb._start", lambda *_: next(left))
    settings, metrics = WandbConfig(mode="offline"), tmp_path / "metrics.jsonl"
    live, later = (WandbSink(settings, "id", tmp_path, {}, metrics, 0) for _ in runs)
    monitor._sinks.append(live)
    monitor.step(step(1, sources=SOURCES, stage="english", memory={"allocated": 7}, figures={"lag": 2.0}))
    monitor.validation(1, ValidationReport(3.25, {"ja": 1000.0, "en": 3.5}, {"rewards/margins": 0.5}))
    monitor.event(Event("gradients", 2, "gradients", {"gradients": {"layer_000": {"mlp": {"norm": float("nan")}}}}))
    monitor.event(Event("skip", 2, "nothing to draw"))
    monitor.step(step(3, has_perplexity=False, step_seconds={"data": 0.5}))
    monitor.event(Event("evaluation", 1, "late", {"results": {"score": 0.5}}))
    monitor.step(StepReport(4, {"loss": float("inf")}, 1e-3, 0.7, 32, 7, ExpertStatistics({1: LAYER})))
    monitor.validation(4, ValidationReport(3.25, {"ja": 3.0}, has_perplexity=False))
    monitor.close()
    for at, panels in replay(metrics, 0, 4):
        later.log(panels, at)
    later.close()
    assert str(again.rows) == str(drawn.rows)  # a word for NaN, which is not equal to itself
    assert [at for at, _ in drawn.rows] == [1, 2, 3, 4]
    assert [at for at, _ in replay(metrics, 1, 3)] == [2, 3, 3]


def test_a_run_that_begins_anew_before_its_first_checkpoint_keeps_its_w_and_b_run(tmp_path: Path) -> None:
    raw = mapping(checkpoint={"directory": str(tmp_path)}, logging={"wandb": {"mode": "offline"}})
    run, path = load(raw), tmp_path / "metrics.jsonl"
    assert len(new_run_id(run)) == 8
    start = {
        "event": "start",
        "iteration": 0,
        "run": json.loads(json.dumps(to_mapping(run))),
        "wandb_run_id": "0011aabb",
    }
    MetricsFile(path).write(start)
    assert new_run_id(run) == "0011aabb"
    elsewhere = {"parallel": {"pipeline_model_parallel_size": 2}, "train": {**raw["train"], "micro_batch_size": 2}}
    assert new_run_id(load({**raw, **elsewhere})) == "0011aabb"  # fewer nodes are left, as when it has checkpoints
    assert new_run_id(load({**raw, "optimizer": {"kind": "adam", "lr": 7e-3}})) != "0011aabb"  # it draws other curves
    MetricsFile(path).write({"event": "checkpoint", "iteration": 2})  # which somebody has removed to begin anew
    assert new_run_id(run) != "0011aabb"
