#!/usr/bin/env python
"""How fast upcycling is, and how much memory it takes: a dense model to 8 experts, beside writing the same bytes.

  python benchmarks/upcycling_speed.py --record
  python benchmarks/upcycling_speed.py --tiny           to see that it runs

A dense model of 1 GB with random bf16 weights. Plain writing saves tensors that are in memory already, of the target's
size, with safetensors. Each run is a process of its own; they take turns, the page cache warm.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from conversion import write_model
from jobs import Measured, job_parser, reported, run_job
from report import hardware, markdown_table, record, versions

COLUMNS = ("what", "seconds", "MB/s", "of plain writing", "peak MiB", "allowed MiB")
METHODS = ("copy", "fine_grained", "shared_routed", "drop", "noise", "qwen")
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
    if method in ("fine_grained", "shared_routed"):
        raw["method"]["granularity"] = 4
    if method == "shared_routed":
        raw["shared_expert_size"] = dense_width(source) // 2
    return load_config(UpcycleOptions, raw, source="benchmark")


def dense_width(source: str) -> int:
    """Width of the dense feed-forward layers of a checkpoint."""
    from megatron_ext.model_io.open import read_any_model

    return read_any_model(source).ffn_hidden_size


def measured_here(job: str, source: str, target: str, workers: int) -> None:
    """Do one job in this process; print its seconds and peak memory. The import of libraries is not timed."""
    from megatron_ext.command import prefer_huge_pages

    if job != "write":
        prefer_huge_pages()  # as tools/upcycle.py does
    import torch
    from safetensors.torch import save_file

    from megatron_ext.upcycling.plan import make_plan
    from megatron_ext.upcycling.run import upcycle

    if job == "write":
        shards, rest = divmod(int(source), SHARD)
        tensors = [torch.ones(size // 2, dtype=torch.bfloat16) for size in [SHARD] * shards + [rest]]
        Path(target).mkdir()
        with reported():
            for number, tensor in enumerate(tensors):
                save_file({"tensor": tensor}, Path(target) / f"{number}.safetensors")
    else:
        asked = options(job, source, target, workers)
        with reported():
            upcycle(make_plan(asked))


def compare(directory: Path, tiny: bool, rounds: int, workers: int) -> list[list[str]]:
    """Rows of the table."""
    largest = write_model(directory / "dense", dense_model(tiny))
    allowed = 2**30 + 4 * largest
    table = []
    for method in METHODS:
        ours, plain = Measured(), Measured()
        source, target = str(directory / "dense"), directory / "out"
        written = run_job(__file__, Measured(), method, source, target, workers)
        for _ in range(rounds):
            run_job(__file__, ours, method, source, target, workers)
            run_job(__file__, plain, "write", str(written), target, 1)
        ratio = statistics.median(a / b for a, b in zip(ours.seconds, plain.seconds, strict=True))
        for what, row, of in ((method, ours, f"{ratio:.2f}"), ("plain writing", plain, "1.00")):
            seconds = statistics.median(row.seconds)
            bound = "" if row is plain else f"{allowed / 2**20:.0f}{' EXCEEDED' if row.peak > allowed else ''}"
            cells = [f"{written / 1e9:.2f} GB: {what}", f"{seconds:.2f}", f"{written / 1e6 / seconds:.0f}", of]
            table.append([*cells, f"{row.peak / 2**20:.0f}", bound])
    return table


def main() -> None:
    """Measure, print, record."""
    arguments = job_parser(__doc__, rounds=3, gigabytes=8).parse_args()
    if arguments.job:
        measured_here(*arguments.job, arguments.workers)
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="upcycling-") as directory:
        rows = compare(Path(directory), arguments.tiny, arguments.rounds, arguments.workers)
    machine = f"{hardware()}. {versions('torch', 'safetensors')}."
    how = f"Median of {arguments.rounds} runs, taking turns; {arguments.workers} threads, plain writing has one."
    text = f"{machine} {how}\n\n{markdown_table(COLUMNS, rows)}"
    print(text)
    if arguments.record:
        record("Upcycling, speed" + (" (tiny)" if arguments.tiny else ""), text)


if __name__ == "__main__":
    main()
