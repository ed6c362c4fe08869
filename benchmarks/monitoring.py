#!/usr/bin/env python
"""What reports cost a run, sink by sink, and how long the page of a run of 100,000 steps takes and how large it is.

python benchmarks/monitoring.py --record
python benchmarks/monitoring.py --tiny           to see that it runs
"""

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from report import hardware, markdown_table, record, versions

from megatron_ext.mcore.moe.metrics import LayerHealth
from megatron_ext.monitoring.events import Event
from megatron_ext.monitoring.report import read_phases, write_report
from megatron_ext.monitoring.sinks.base import Sink
from megatron_ext.monitoring.sinks.console import ConsoleSink
from megatron_ext.monitoring.sinks.jsonl import JsonlSink
from megatron_ext.monitoring.sinks.tensorboard import TensorboardSink
from megatron_ext.monitoring.sources import SourceReport
from megatron_ext.monitoring.step_report import StepRecord, StepReport, step_panels_of

_PARTS = {"data": 0.01, "forward_backward": 0.9, "optimizer": 0.08, "reports": 0.01}


def report_of(step: int, layers: int, experts: int, rng: random.Random) -> StepRecord:
    """A report as a run of that size makes it."""
    shares = [rng.random() for _ in range(experts)]
    load = [share / sum(shares) for share in shares]
    health = {
        layer: LayerHealth(load, 0.0, 0.9, 0.4, 1.5, {"aux_loss": 1.0 + rng.random()}) for layer in range(1, layers + 1)
    }
    loss = 2.0 + 8.0 / (1 + step / 500) + rng.gauss(0, 0.05) + (6.0 if step % 17_001 == 17_000 else 0.0)
    sources = {
        name: SourceReport(loss + shift, 1e6, step * 4096, step / 1e4) for name, shift in (("en", 0.0), ("ja", 0.4))
    }
    report = StepReport(step, {"loss": loss}, 1e-4, 1.0, step * 8, 2**34, health, sources, step_seconds=_PARTS)
    values: dict[str, Any] = {
        "iteration": step,
        "loss": loss,
        "perplexity": 1.0,
        "learning_rate": 1e-4,
        "grad_norm": 1.0 + abs(rng.gauss(0, 0.1)),
        "consumed_samples": step * 8,
        "consumed_tokens": step * 8 * 4096,
        "planned_tokens": 10**12,
        "supervised_tokens": 32768,
        "seconds_per_step": 1.0,
        "tokens_per_second": 32768.0 + rng.random(),
        "tflops_per_device": 400.0 + rng.random(),
        "memory_bytes": 2**34,
        "time": 1.7e9 + step,
        "step_seconds": _PARTS,
        "sources": {name: dict(vars(source)) for name, source in sources.items()},
        "moe": {
            str(layer): {"load": load, "entropy": 0.9, "max_violation": max(load) * experts - 1} for layer in health
        },
    }
    return StepRecord(report, values, 200_000, 3600.0)


def cost_of_sinks(folder: Path, layers: int, experts: int) -> list[tuple[str, str]]:
    """Milliseconds a report, by sink."""
    reports = [report_of(step, layers, experts, random.Random(step)) for step in range(1, 101)]
    sinks: dict[str, Sink] = {
        "console": ConsoleSink(),
        "metrics.jsonl": JsonlSink(folder / "cost.jsonl", 0),
        "TensorBoard": TensorboardSink(folder / "tb", 0, {}),
    }
    rows = []
    for name, sink in sinks.items():
        begun = time.perf_counter()
        for one in reports:
            sink.step(one)
        rows.append((name, f"{(time.perf_counter() - begun) / len(reports) * 1e3:.2f}"))
        sink.close(failed=False)
    begun = time.perf_counter()
    for one in reports:
        step_panels_of(one.values)
    return [*rows, ("panels of W&B, without W&B", f"{(time.perf_counter() - begun) / len(reports) * 1e3:.2f}")]


def cost_of_page(folder: Path, steps: int, layers: int, experts: int) -> list[tuple[str, str]]:
    """Size of the metrics file, seconds of reading and writing, size of the page."""
    file, rng = JsonlSink(folder / "metrics.jsonl", 0), random.Random(1)
    for step in range(1, steps + 1):
        file.step(report_of(step, layers, experts, rng))
        if step % 17_001 == 17_000:
            file.event(Event("spike", step, "the loss is far above its mean"))
    file.close(failed=False)
    begun = time.perf_counter()
    phases = read_phases([f"run={folder / 'metrics.jsonl'}"])
    read = time.perf_counter()
    write_report(folder / "report.html", "benchmark", phases, [], None)
    written = time.perf_counter()
    return [
        ("metrics file, GB", f"{(folder / 'metrics.jsonl').stat().st_size / 1e9:.2f}"),
        ("reading it, s", f"{read - begun:.1f}"),
        ("writing the page, s", f"{written - read:.1f}"),
        ("the page, MB", f"{(folder / 'report.html').stat().st_size / 1e6:.2f}"),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="few steps of a small model")
    parser.add_argument("--keep", type=Path, help="folder for the files, which stay there")
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = o.keep or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        steps, layers, experts = (500, 4, 16) if o.tiny else (100_000, 24, 64)
        what = f"{steps:,} steps, {layers} layers of {experts} experts, two sources"
        text = "\n\n".join(
            [
                f"{hardware()}\n{versions('torch')}\n{what}",
                markdown_table(("a report to", "ms"), cost_of_sinks(folder, layers, experts)),
                markdown_table(("tools/report.py", ""), cost_of_page(folder, steps, layers, experts)),
            ]
        )
    print(text)
    if o.record:
        record("Monitoring", text)


if __name__ == "__main__":
    main()
