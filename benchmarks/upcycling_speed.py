#!/usr/bin/env python
"""How fast upcycling is, and how much memory it takes: a dense model to 8 experts, beside writing the same bytes.

  python benchmarks/upcycling_speed.py --record
  python benchmarks/upcycling_speed.py --tiny           to see that it runs

A dense model of 1 GB with random bf16 weights. Plain writing saves tensors that are in memory already, of the target's
size, with safetensors. Each run is a process of its own; they take turns, the page cache warm.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from conversion import Measured, write_model
from report import hardware, markdown_table, record, versions

COLUMNS = ("what", "seconds", "MB/s", "of plain writing", "peak MiB", "allowed MiB")
METHODS = ("copy", "drop", "shared_routed")
SHARD = 10**9


def dense_model(tiny: bool) -> Any:
    """0.92 GB in bf16, or a few MB."""
    from megatron_ext.config import ModelConfig

    scale = 16 if tiny else 1
    return ModelConfig(
        num_layers=16,
        hidden_size=1536 // scale,
        ffn_hidden_size=4096 // scale,
        num_attention_heads=12,
        num_query_groups=4,
        vocab_size=32_000 // scale,
        max_position_embeddings=4096,
    )


def options(method: str, source: str, target: str, workers: int) -> Any:
    """An upcycling without its function check, which loads both models."""
    from megatron_ext.config import load_config
    from megatron_ext.upcycling.options import UpcycleOptions

    raw: dict[str, Any] = {
        "sources": [source],
        "target": target,
        "method": {"kind": method},
        "num_experts": 8,
        "topk": 4,
        "logits": False,
        "workers": workers,
    }
    if method == "shared_routed":
        raw["shared_expert_size"] = dense_width(source) // 2
        raw["method"]["granularity"] = 4
    return load_config(UpcycleOptions, raw, source="benchmark")


def dense_width(source: str) -> int:
    """Width of the dense feed-forward layers of a checkpoint."""
    from megatron_ext.conversion.sources import read_any_model

    return read_any_model(source).ffn_hidden_size


def measured_here(job: str, source: str, target: str, workers: int) -> None:
    """Do one job in this process; print its seconds and peak memory. The import of libraries is not timed."""
    from megatron_ext.command import prefer_huge_pages

    if job != "write":
        prefer_huge_pages()  # as tools/upcycle.py does
    import torch
    from safetensors.torch import save_file

    from megatron_ext.upcycling.run import upcycle
    from megatron_ext.upcycling.upcycle import make_plan

    if job == "write":
        shards, rest = divmod(int(source), SHARD)
        tensors = [torch.ones(size // 2, dtype=torch.bfloat16) for size in [SHARD] * shards + [rest]]
        Path(target).mkdir()
        begin = time.perf_counter()
        for number, tensor in enumerate(tensors):
            save_file({"tensor": tensor}, Path(target) / f"{number}.safetensors")
    else:
        plan = options(job, source, target, workers)
        begin = time.perf_counter()
        upcycle(make_plan(plan))
    seconds = time.perf_counter() - begin
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


def measure(row: Measured, job: str, source: str, target: Path, workers: int) -> int:
    """Run one job in a process of its own, remove what it wrote and return the bytes of that."""
    arguments = ["--job", job, source, str(target), "--workers", str(workers)]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    row.seconds.append(seconds)
    row.peak = max(row.peak, peak)
    written = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    shutil.rmtree(target)
    target.with_name(target.name + ".yaml").unlink(missing_ok=True)
    print(f"  {job}: {seconds:.2f} s, {peak / 2**20:.0f} MiB", file=sys.stderr)
    return written


def compare(directory: Path, tiny: bool, rounds: int, workers: int) -> list[list[str]]:
    """Rows of the table."""
    largest = write_model(directory / "dense", dense_model(tiny))
    allowed = 2**30 + 4 * largest
    table = []
    for method in METHODS:
        ours, plain = Measured(), Measured()
        source, target = str(directory / "dense"), directory / "out"
        written = measure(Measured(), method, source, target, workers)
        for _ in range(rounds):
            measure(ours, method, source, target, workers)
            measure(plain, "write", str(written), target, 1)
        ratio = statistics.median(a / b for a, b in zip(ours.seconds, plain.seconds, strict=True))
        for what, row, of in ((method, ours, f"{ratio:.2f}"), ("plain writing", plain, "1.00")):
            seconds = statistics.median(row.seconds)
            bound = "" if row is plain else f"{allowed / 2**20:.0f}{' EXCEEDED' if row.peak > allowed else ''}"
            cells = [f"{written / 1e9:.2f} GB: {what}", f"{seconds:.2f}", f"{written / 1e6 / seconds:.0f}", of]
            table.append([*cells, f"{row.peak / 2**20:.0f}", bound])
    return table


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="timed runs of each (default 3)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads (default 2)")
    parser.add_argument("--directory", metavar="DIR", help="where to write up to 8 GB (default: a temporary folder)")
    parser.add_argument("--tiny", action="store_true", help="models of a few MB, to see that it runs")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    parser.add_argument("--job", nargs=3, metavar=("JOB", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        measured_here(*arguments.job, arguments.workers)
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="upcycling-") as directory:
        rows = compare(Path(directory), arguments.tiny, arguments.rounds, arguments.workers)
    machine = f"{hardware()}. {versions('torch', 'safetensors')}. Median of {arguments.rounds} runs, taking turns."
    text = f"{machine}\n\n{markdown_table(COLUMNS, rows)}"
    print(text)
    if arguments.record:
        record("Upcycling, speed" + (" (tiny)" if arguments.tiny else ""), text)


if __name__ == "__main__":
    main()
