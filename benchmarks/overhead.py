#!/usr/bin/env python
"""What watching over a run costs: guard, every metric of every step and asynchronous checkpoints, beside a run without.

python benchmarks/overhead.py --folder DIR            five rounds (a quarter of an hour on 2 cores)
python benchmarks/overhead.py --folder DIR --record   and append the table to benchmarks/RESULTS.md

The same MoE model of 8 layers trains the same steps in jobs that take turns, on one thread of computation: `bare`
reports every 40th step and saves nothing; the others add one thing after the other. Seconds are those between report
40 and the last one, with everything between; a round's ratio compares jobs that ran one after the other.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from report import hardware, markdown_table, record, versions
from run_data import ROOT, prepare

from megatron_ext.config import dump_yaml
from megatron_ext.monitoring.metrics_file import read_metrics

VOCABULARY, FIRST = 4096, 40
WATCHED = {
    "bare": ["logging.log_interval=40", "guard.max_nonfinite_in_row=0"],
    "+ guard": ["logging.log_interval=40"],
    "+ all metrics of every step": ["logging.tensorboard_directory={directory}/tensorboard"],
    "+ a checkpoint every 40 steps": [
        "logging.tensorboard=true",
        "checkpoint.save_interval=40",
        "checkpoint.keep_last=2",
    ],
}
"""Overrides of the run, by what they add."""


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


def job(folder: Path, name: str, overrides: list[str]) -> float:
    """Seconds a step of a job from the beginning."""
    directory = folder / f"run {name}"
    given = [override.format(directory=directory) for override in overrides]
    command = [sys.executable, str(ROOT / "tools" / "train.py"), str(folder / "run.yaml"), *given]
    subprocess.run(
        [*command, f"checkpoint.directory={directory}"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    times = {report["iteration"]: report["time"] for report in read_metrics(directory / "metrics.jsonl")}
    last = max(times)
    shutil.rmtree(directory)
    return (times[last] - times[FIRST]) / (last - FIRST)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="jobs of each kind (default 5)")
    parser.add_argument("--steps", type=int, default=120, metavar="N", help="a job's steps, of 40 (default 120)")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    prepare(options.folder, VOCABULARY)
    (options.folder / "run.yaml").write_text(dump_yaml(configuration(options.folder, options.steps)))
    seconds: dict[str, list[float]] = {name: [] for name in WATCHED}
    for _ in range(options.rounds):
        for name, overrides in WATCHED.items():
            seconds[name].append(job(options.folder, name, overrides))
            print(f"  {name}: {seconds[name][-1]:.4f} s a step", file=sys.stderr)
    bare = seconds["bare"]
    rows = [
        [
            name,
            f"{statistics.median(found):.4f}",
            f"{statistics.median(one / other for one, other in zip(found, bare, strict=True)):.3f}",
            f"{min(found) / min(bare):.3f}",
        ]
        for name, found in seconds.items()
    ]
    table = markdown_table(["watched", "s/step", "to bare: median of rounds", "to bare: fastest jobs"], rows)
    text = f"{hardware()}; {versions('torch', 'megatron-core')}\n\n{table}"
    print(text)
    if options.record:
        record("What watching over a run costs", text)


if __name__ == "__main__":
    main()
