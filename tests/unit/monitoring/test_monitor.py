"""Reports of a run: throughput and FLOP/s from the clock and the formula, in the metrics file and on the console."""

import logging
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.config import to_mapping
from megatron_ext.mcore.moe.metrics import ExpertStatistics, LayerHealth
from megatron_ext.monitoring.clock import Clock
from megatron_ext.monitoring.events import Event
from megatron_ext.monitoring.metrics_file import read_metrics
from megatron_ext.monitoring.monitor import Monitor, StepReport
from megatron_ext.monitoring.sources import SourceReport, ValidationReport, step_panels, step_values, validation_panels
from megatron_ext.planning.flops import training_flops_per_token
from megatron_ext.testing.tiny import tiny_model
from tests.support.minimal_run import load, mapping
from tests.unit.training.plans import part, plan_of, plan_of_run


class Time:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)


def test_the_output_z_loss_is_reported_beside_the_loss(tmp_path: Path) -> None:
    run = load(mapping(checkpoint={"directory": str(tmp_path)}))
    monitor = Monitor(run, run.resolve(1), plan_of_run(run), 0, "abcd1234", Clock())
    monitor.step(step(1))
    monitor.step(replace(step(2), losses={"loss": 2.5, "output_z_loss": 0.125}))
    monitor.close()
    first, second = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    assert "output_z_loss" not in first
    assert (second["loss"], second["output_z_loss"]) == (2.5, 0.125)


def step(iteration: int, experts: ExpertStatistics | None = None) -> StepReport:
    return StepReport(iteration, {"loss": 2.5}, 1e-3, 0.7, iteration * 8, 3 * 2**20, experts)


def test_sources_and_the_stage_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = load(mapping(checkpoint={"directory": str(tmp_path)}))
    monitor = Monitor(run, run.resolve(1), plan_of_run(run), 0, "abcd1234", Clock())
    sources = {f"s{n}": SourceReport(2.0 + n, 10.0 * (n + 1), 640 * n, n / 2) for n in range(6)}
    sources["masked"] = SourceReport(None, 0.0, 64, 0.1)
    monitor.step(replace(step(1), sources=sources, stage="english", steps=4))
    monitor.step(replace(step(2), sources={"s0": sources["s0"]}))
    monitor.close()
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["stage"], first["supervised_tokens"]) == ("english", 210)
    assert "stage" not in second
    assert first["sources"]["s1"] == {"loss": 3.0, "supervised_tokens": 20, "consumed_tokens": 640, "epochs": 0.5}
    assert first["sources"]["masked"]["loss"] is None
    assert (
        "step 1/100 | stage english | loss 2.5000 | 4 steps: s2 4.000, s3 5.000, s4 6.000, s5 7.000 and 2 more | lr"
        in caplog.text
    )
    assert "step 2/100 | loss 2.5000 | lr" in caplog.text
    assert step_panels(step_values({"ja": sources["masked"]})) == {
        "sources/supervised_tokens/ja": 0.0,
        "sources/consumed_tokens/ja": 64,
        "sources/epochs/ja": 0.1,
    }
    panels = validation_panels(ValidationReport(0.0, {"ja": 1000.0}))
    assert panels == {
        "validation/loss": 0.0,
        "validation/perplexity": 1.0,
        "validation/loss/ja": 1000.0,
        "validation/perplexity/ja": math.inf,
    }


def test_throughput_leaves_out_what_is_not_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, watch = Time(monkeypatch), Clock()
    caplog.set_level(logging.INFO)
    raw = mapping(checkpoint={"directory": str(tmp_path)}, logging={"log_interval": 4, "peak_tflops": 1e-3})
    raw["model"] = to_mapping(tiny_model(moe=True))
    run = load(raw)
    monitor = Monitor(run, run.resolve(2), plan_of_run(run), 0, "abcd1234", watch)
    clock.now += 20  # two steps
    with watch.stopped():
        clock.now += 1000
        monitor.validation(2, ValidationReport(3.25, {"ja": 3.0, "en": 3.5}))
    clock.now += 20  # two more
    busy = LayerHealth([0.4, 0.3, 0.3, 0.0], 0.1, 0.9, 0.5, 2.0, {"aux_loss": 1.1})
    even = LayerHealth([0.25] * 4, 0.0, 1.0, 0.25, 1.0, {"aux_loss": 1.0})
    monitor.step(step(4, {1: busy, 2: even}))
    monitor.close()
    validation, report = read_metrics(tmp_path / "metrics.jsonl")
    assert validation["validation_loss"] == 3.25
    assert validation["sources"]["en"] == {"loss": 3.5, "perplexity": pytest.approx(33.115, abs=1e-3)}
    assert "validation loss 3.2500, perplexity 25.79 | ja 3.0000 (20.09), en 3.5000 (33.12)" in caplog.text
    assert report["seconds_per_step"] == 10
    rate = 8 * 64 / 10
    assert report["tokens_per_second"] == pytest.approx(rate)
    tflops = rate * training_flops_per_token(run.model, 64) / 2 / 1e12
    assert report["tflops_per_device"] == pytest.approx(tflops)
    assert report["mfu"] == pytest.approx(tflops / 1e-3)
    layer = report["moe"]["1"]
    assert layer["load"] == [0.4, 0.3, 0.3, 0.0]
    names = ("max_violation", "dead_experts", "drop_rate", "entropy", "top1", "max1_max2", "aux_loss")
    assert [layer[name] for name in names] == pytest.approx([0.6, 1, 0.1, 0.9, 0.5, 2.0, 1.1])
    assert report["moe"]["2"]["max_violation"] == 0
    assert report["consumed_tokens"] == 4 * 8 * 64
    assert "step 4/100 | loss 2.5000 | lr 1.00e-03 | norm 0.700 | tokens 2.05K of 51.2K | tok/s 51" in caplog.text
    # 40 s for 4 steps, of which 96 are left; the unit of a rate is one that has digits.
    assert f"| compute {tflops * 1e6:.1f} MFLOP/s/device | mfu {tflops * 1e5:.1f}% | memory 3 MiB |" in caplog.text
    assert "MaxVio 0.60 | dead experts 1 | left 16 min" in caplog.text


def test_the_time_left_is_that_of_the_steps_after_the_first_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, watch = Time(monkeypatch), Clock()
    caplog.set_level(logging.INFO)
    run = load(mapping(checkpoint={"directory": str(tmp_path)}, train={"stop_at_iteration": 50}))
    monitor = Monitor(run, run.resolve(1), plan_of_run(run), 0, "abcd1234", watch)
    clock.now += 500  # compiling, filling caches
    monitor.step(step(1))
    for done in (2, 3, 50):
        clock.now += 10
        with watch.stopped():
            clock.now += 5  # saving is part of what is left
        monitor.step(step(done))
    monitor.close()
    ends = [message.rpartition(" | ")[2] for message in caplog.messages]
    assert ends == ["left 6 h 48 min", "left 12 min", "left 11 min", "memory 3 MiB"]


def test_steps_of_stages_count_with_their_own_tokens_and_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """4 steps of 512 tokens, then 2 of 2,048 that attend four times as far."""
    clock, watch = Time(monkeypatch), Clock()
    caplog.set_level(logging.INFO)
    run = load(mapping(checkpoint={"directory": str(tmp_path)}))
    plan = plan_of(part("short", 4), part("long", 2, 8, 256))
    monitor = Monitor(run, run.resolve(1), plan, 0, "abcd1234", watch)
    for iteration, seconds in ((3, 30), (5, 50), (6, 10)):
        clock.now += seconds
        monitor.step(step(iteration))
    monitor.close()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["consumed_tokens"] for record in records] == [1536, 2048 + 2048, 2048 + 2 * 2048]
    assert {record["planned_tokens"] for record in records} == {6144}
    assert [record["tokens_per_second"] for record in records] == [51.2, (512 + 2048) / 50, 204.8]
    short, long = (tokens * training_flops_per_token(run.model, length) for tokens, length in ((512, 64), (2048, 256)))
    work = [3 * short / 30, (short + long) / 50, long / 10]
    assert [record["tflops_per_device"] * 1e12 for record in records] == pytest.approx(work)
    assert "step 5/6 |" in caplog.text
    # What is left is counted by its work, at the rate of what came after the first report.
    left = long * 50 / (short + long)
    assert caplog.messages[1].endswith(f"| left {left:.0f} s")


def test_steps_that_were_passed_over_are_neither_time_nor_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six steps all but the first and the last, one of each stage; the report after that starts anew."""
    clock, watch = Time(monkeypatch), Clock()
    run = load(mapping(checkpoint={"directory": str(tmp_path)}))
    plan = plan_of(part("short", 3), part("long", 4, 8, 256))
    monitor = Monitor(run, run.resolve(1), plan, 0, "abcd1234", watch)
    monitor.passed_over(1, 3)
    monitor.passed_over(3, 5)
    for iteration in (6, 7):
        clock.now += 20
        monitor.step(step(iteration))
    monitor.close()
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert [first["seconds_per_step"], second["seconds_per_step"]] == [10, 20]
    assert [first["tokens_per_second"], second["tokens_per_second"]] == [(512 + 2048) / 20, 2048 / 20]
    short, long = (tokens * training_flops_per_token(run.model, length) for tokens, length in ((512, 64), (2048, 256)))
    work = [(short + long) / 20, long / 20]
    assert [one["tflops_per_device"] * 1e12 for one in (first, second)] == pytest.approx(work)


def test_a_terminal_shows_columns_and_as_many_as_it_has_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, watch = Time(monkeypatch), Clock()
    caplog.set_level(logging.INFO)
    run = load(mapping(checkpoint={"directory": str(tmp_path)}))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monitor = Monitor(run, run.resolve(1), plan_of_run(run), 0, "abcd1234", watch)
    columns = [200]
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((columns[0], 30)))
    clock.now += 0.01
    monitor.step(step(9))
    clock.now += 500
    monitor.step(step(10))
    columns[0] = 90
    clock.now += 10
    monitor.step(replace(step(11), losses={"loss": 12.5}))
    monitor.close()
    fast, slow, narrow = caplog.messages
    assert fast.startswith("step   9/100   9% | loss 2.5000 | lr 1.00e-03 | norm 0.700 | tokens 4.61K of 51.2K | tok/s")
    # The last columns have become wider.
    assert [place for place, mark in enumerate(fast) if mark == "|"][:6] == [
        place for place, mark in enumerate(slow) if mark == "|"
    ][:6]
    assert len(narrow) <= 80
    assert narrow.startswith("step  11/100  11% | loss 12.5000 | ")
    assert re.search(r"left 6 h 18 min$", narrow)


def test_a_console_that_is_off_still_says_what_happens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = load(mapping(checkpoint={"directory": str(tmp_path)}, logging={"console": False}))
    monitor = Monitor(run, run.resolve(1), plan_of_run(run), 0, "abcd1234", Clock())
    monitor.step(step(1))
    monitor.validation(1, ValidationReport(3.25, {}))
    monitor.event(Event("skip", 2, "passed over"))
    monitor.close()
    assert caplog.messages == ["step 2: passed over"]


def test_sinks_that_are_off_are_not_imported() -> None:
    code = (
        "import sys, megatron_ext.monitoring.monitor; "
        "print([m for m in ('tensorboardX', 'smtplib', 'megatron_ext.monitoring.sinks.wandb') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
