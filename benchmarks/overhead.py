#!/usr/bin/env python
"""What watching over a run costs: guard, every metric of every step and asynchronous checkpoints, beside a run without.

python benchmarks/overhead.py --folder DIR            three rounds (twenty minutes on 2 cores)
python benchmarks/overhead.py --folder DIR --record   and append the table to benchmarks/RESULTS.md

The same MoE model of 8 layers trains the same steps in jobs that take turns, on one thread of computation: `bare`
reports every 20th step and saves nothing; the others add one thing after the other. Seconds are those between report
20 and the last one, with everything between; a round's ratio compares jobs that ran one after the other. Processor
seconds, of all threads of a job, hold still on a machine that has other work, and count what a thread writes beside.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from report import hardware, markdown_table, record, versions
from run_data import ROOT, prepare

from megatron_ext.config import dump_yaml
from megatron_ext.monitoring.metrics_file import read_metrics

VOCABULARY, FIRST = 4096, 20
WATCHED = {
    "bare": ["logging.log_interval=20", "guard.max_nonfinite_in_row=0"],
    "+ guard": ["logging.log_interval=20"],
    "+ all metrics of every step": ["logging.tensorboard_directory={directory}/tensorboard"],
    "+ a checkpoint every 20 steps": [
        "logging.tensorboard_directory={directory}/tensorboard",
        "checkpoint.save_interval=20",
        "checkpoint.keep_last=2",
    ],
}
"""Overrides of the run, by what they add."""


class Cost(NamedTuple):
    """What a step took: seconds on the clock and of processors."""

    clock: float
    processors: float


def configuration(folder: Path, steps: int) -> dict:
    """The run that is watched."""
    return {
        "model": {
            "num_layers": 8,
            "hidden_size": 256,
            "ffn_hidden_size": 512,
            "num_attention_heads": 8,
            "num_query_groups": 4,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 256,
            "num_moe_experts": 8,
            "moe_ffn_hidden_size": 256,
            "moe_aux_loss_coeff": 0.01,
        },
        "precision": {"kind": "fp32"},
        "train": {"train_iters": steps, "global_batch_size": 8, "micro_batch_size": 4},
        "optimizer": {"kind": "adam", "lr": 1e-3},
        "schedule": {"kind": "constant"},
        "data": {
            "sequence_length": 256,
            "tokenizer": str(folder / "tokenizer"),
            "train": [{"path": str(folder / "data" / "train")}],
        },
        "checkpoint": {"directory": str(folder / "run")},
        "runtime": {"device": "cpu", "threads": 1},
    }


def job(folder: Path, name: str, overrides: list[str], last: int) -> Cost:
    """What a step of a job from the beginning costs."""
    directory = folder / f"run {name}"
    given = [override.format(directory=directory) for override in overrides]
    command = [sys.executable, str(ROOT / "tools" / "train.py"), str(folder / "run.yaml"), *given]
    with open(folder / "last_job.log", "w") as log:
        process = psutil.Popen(
            [*command, f"checkpoint.directory={directory}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    first, end = (_at_report(process, directory / "metrics.jsonl", step) for step in (FIRST, last))
    if process.wait():
        sys.exit(f"{' '.join(command)}: ended with {process.returncode}; see {log.name}")
    shutil.rmtree(directory)
    return Cost(*((after - before) / (last - FIRST) for before, after in zip(first, end, strict=True)))


def _at_report(process: psutil.Popen, metrics: Path, step: int) -> Cost:
    """The clock and the seconds of processors that `process` has used when it reports `step`."""
    while process.poll() is None:
        if metrics.exists() and any(report["iteration"] >= step for report in read_metrics(metrics)):
            used = process.cpu_times()
            return Cost(time.monotonic(), used.user + used.system)
        time.sleep(0.02)
    sys.exit(f"{metrics.parent.name}: ended with {process.returncode} before step {step}; see last_job.log")


def _columns(found: list[Cost], bare: list[Cost]) -> list[str]:
    """Clock and processors: the median of the jobs, and that of each job's ratio to the bare one of its round."""
    columns = []
    for kind in Cost._fields:
        mine, others = ([getattr(cost, kind) for cost in costs] for costs in (found, bare))
        ratio = statistics.median(one / other for one, other in zip(mine, others, strict=True))
        columns += [f"{statistics.median(mine):.4f}", f"{ratio:.3f}"]
    return columns


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="jobs of each kind (default 3)")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="steps of a job (default 60)")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    prepare(options.folder, VOCABULARY)
    (options.folder / "run.yaml").write_text(dump_yaml(configuration(options.folder, options.steps)))
    costs: dict[str, list[Cost]] = {name: [] for name in WATCHED}
    for _ in range(options.rounds):
        for name, overrides in WATCHED.items():
            costs[name].append(job(options.folder, name, overrides, options.steps))
            print(f"  {name}: {costs[name][-1]}", file=sys.stderr)
    rows = [[name, *_columns(found, costs["bare"])] for name, found in costs.items()]
    table = markdown_table(["watched", "s/step", "to bare", "processor s/step", "to bare"], rows)
    text = f"{hardware()}; {versions('torch', 'megatron-core')}\n\n{table}"
    print(text)
    if options.record:
        record("What watching over a run costs", text)


if __name__ == "__main__":
    main()
