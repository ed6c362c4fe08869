#!/usr/bin/env python
"""How fast conversion is, and how much memory it takes: beside plain copying of the same bytes, both ways.

  python benchmarks/conversion.py --record
  python benchmarks/conversion.py --tiny           to see that it runs

A dense model of 2 GB and a MoE of 4 GB with random bf16 weights. A plain copy loads every safetensors file and saves
it again. Each run is a process of its own; conversions and copies take turns, the page cache warm for both.
"""

import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from jobs import Measured, job_parser, reported, run_job
from report import hardware, markdown_table, record, versions

COLUMNS = ("what", "seconds", "MB/s", "of a plain copy", "CPU s", "of a plain copy", "peak MiB", "allowed MiB")

# Tanuki-8x8B in bf16: 46,973,325,312 parameters.
LARGE_BYTES = 2 * 46_973_325_312


def models(tiny: bool) -> dict[str, Any]:
    """The models: layers, widths and vocabulary of 2 GB and 4 GB in bf16, or of a few MB."""
    from megatron_ext.config import GatingNormalization, ModelConfig

    scale = 16 if tiny else 1
    shared: dict[str, Any] = {
        "hidden_size": 2048 // scale,
        "num_attention_heads": 16,
        "num_query_groups": 4,
        "vocab_size": 65_024 // scale,
        "max_position_embeddings": 4096,
    }
    dense = ModelConfig(**shared, num_layers=14, ffn_hidden_size=7168 // scale)
    moe = ModelConfig(
        **shared,
        num_layers=16,
        ffn_hidden_size=7168 // scale,
        num_moe_experts=16,
        moe_router_topk=2,
        moe_ffn_hidden_size=1024 // scale,
        moe_first_k_dense=1,
        moe_shared_expert_intermediate_size=1024 // scale,
        moe_gating_normalization=GatingNormalization(),
    )
    return {"dense": dense, "MoE": moe}


def write_model(directory: Path, model: Any) -> int:
    """Write a Megatron checkpoint with random weights; return the bytes of its largest tensor."""
    import torch

    from megatron_ext.canonical.catalogue import model_shapes
    from megatron_ext.checkpoint.streams import MegatronSink, TensorSpec
    from megatron_ext.config import to_mapping

    specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in model_shapes(model).items()}
    generator = torch.Generator().manual_seed(0)
    with MegatronSink(directory, specs, {"model": to_mapping(model)}) as sink:
        for name, spec in specs.items():
            sink.write(name, torch.empty(spec.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator))
    return max(spec.bytes for spec in specs.values())


def measured_here(job: str, source: str, target: str, workers: int) -> None:
    """Do one job in this process and print its seconds and peak memory; the import of libraries is not timed."""
    from megatron_ext.command import prefer_huge_pages

    if job == "convert":
        prefer_huge_pages()  # as tools/convert.py does
    from safetensors.torch import load_file, save_file

    from megatron_ext.model_io.convert import convert

    with reported():
        if job == "copy":
            Path(target).mkdir()
            for path in sorted(Path(source).glob("*.safetensors")):
                save_file(load_file(path), Path(target) / path.name)
        else:
            convert(source, target, workers=workers)


def _threads(count: int) -> str:
    return f"{count} worker{'s' if count > 1 else ''}"


def compare(directory: Path, name: str, model: Any, rounds: int, workers: int) -> tuple[list[list[str]], float]:
    """The rows of one model, and the bytes a second of the slowest conversion on all workers."""
    from megatron_ext.model_io.convert import convert

    largest = write_model(directory / "megatron", model)
    total = convert(directory / "megatron", directory / "hf", workers=workers).written.bytes
    tasks = {
        "plain copy": ("copy", directory / "hf", 1),
        **{f"to Hugging Face, {_threads(n)}": ("convert", directory / "megatron", n) for n in sorted({1, workers})},
        **{f"to Megatron, {_threads(n)}": ("convert", directory / "hf", n) for n in sorted({1, workers})},
    }
    rows = {what: Measured() for what in tasks}
    for turn in range(rounds + 1):
        for what, (job, source, count) in tasks.items():
            run_job(__file__, rows[what], job, str(source), directory / "out", count)
            if turn == 0:
                rows[what] = Measured()  # the page cache warms up
    shutil.rmtree(directory / "megatron")
    shutil.rmtree(directory / "hf")
    copy = rows["plain copy"]
    table, slowest = [], float("inf")
    for what, row in rows.items():
        seconds = statistics.median(row.seconds)
        ratio = statistics.median(a / b for a, b in zip(row.seconds, copy.seconds, strict=True))
        cpu, copy_cpu = statistics.median(row.cpu), statistics.median(copy.cpu)
        bound = 2**30 + 3 * largest
        allowed = "" if what == "plain copy" else f"{bound / 2**20:.0f}{' EXCEEDED' if row.peak > bound else ''}"
        speed = [f"{seconds:.2f}", f"{total / 1e6 / seconds:.0f}", f"{ratio:.2f}"]
        work = [f"{cpu:.2f}", f"{cpu / copy_cpu:.2f}", f"{row.peak / 2**20:.0f}", allowed]
        table.append([f"{name}, {total / 1e9:.2f} GB: {what}", *speed, *work])
        slowest = min(slowest, total / seconds)
    return table, slowest


def main() -> None:
    """Measure, print, record."""
    arguments = job_parser(__doc__, rounds=5, gigabytes=13).parse_args()
    if arguments.job:
        measured_here(*arguments.job, arguments.workers)
        return
    rows, slowest = [], float("inf")
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="conversion-") as directory:
        for name, model in models(arguments.tiny).items():
            print(name, file=sys.stderr)
            table, rate = compare(Path(directory), name, model, arguments.rounds, arguments.workers)
            rows += table
            slowest = min(slowest, rate)
    text = "\n\n".join(
        [
            f"{hardware()}. {versions('torch', 'safetensors')}. Median of {arguments.rounds} runs, taking turns.",
            markdown_table(COLUMNS, rows),
            large_model(slowest),
        ]
    )
    print(text)
    if arguments.record:
        record("Conversion" + (" (tiny)" if arguments.tiny else ""), text)


def large_model(rate: float) -> str:
    """By arithmetic, what an export of Tanuki-8x8B takes: reading and writing 94 GB, no faster than measured here."""
    # Sequential rates of a laptop's NVMe disk once its cache is full: 3 GB/s to read, 1 GB/s to write.
    disk = LARGE_BYTES / 3e9 + LARGE_BYTES / 1e9
    lines = (
        f"By arithmetic an export of Tanuki-8x8B (46,973,325,312 parameters, {LARGE_BYTES / 1e9:.0f} GB of bf16) takes",
        f"{LARGE_BYTES / rate / 60:.1f} minutes at the slowest rate above, or what the disk takes if that is longer:",
        f"{disk / 60:.1f} minutes on a laptop's SSD that reads 3 GB/s and writes 1 GB/s, one after the other. mbridge",
        "and Megatron-Bridge do not start without Transformer Engine, so they are not in the table.",
    )
    return " ".join(lines)


if __name__ == "__main__":
    main()
