#!/usr/bin/env python
"""How long a plan of 1e9 samples over 1e7 documents takes to open, and its memory; beside megatron-core's GPTDataset.

  python benchmarks/data_plan.py --record
  python benchmarks/data_plan.py --tiny           to see that it runs

Ours: sources of that many documents, three stages of 1e9 samples in all, opened up to the first, a middle and the last
sample. The peer: megatron-core's GPTDataset over one source of as many documents, its index built, up to its first
sample, once as a new index and once as one that is there already. Each job is a process of its own; imports are not
counted, and memory is what the job adds to them. The token files are holes: reading them costs next to nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from report import hardware, markdown_table, record, versions

COLUMNS = ("what", "seconds", "memory MB")
LENGTH = 2048
DOCUMENT = 1000
"""Tokens of a document, in the mean."""
SOURCES = ("ja", "en", "code")


def write_source(prefix: Path, documents: int) -> int:
    """A dataset whose token file is a hole, with the index of that many documents; return its tokens."""
    from megatron_ext.data.indexed import write_index

    lengths = np.random.default_rng(0).integers(1, 2 * DOCUMENT, documents)
    tokens = int(lengths.sum())
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * tokens)
    write_index(Path(f"{prefix}.idx"), lengths, np.dtype(np.uint16))
    return tokens


def open_plan(folder: Path, samples: int) -> Callable[[], None]:
    """Prepare to plan `samples` samples of the sources in `folder` and to read three of them."""
    from megatron_ext.config import Amount, DataConfig, Stage, StagedSource, TrainConfig
    from megatron_ext.data.stream.make_plan import SourceSize, make_plan
    from megatron_ext.data.stream.units import PlannedSamples, TokenFile

    tokens = json.loads((folder / "tokens.json").read_text())
    stages = [
        Stage(name="first", mix={"ja": 0.5, "en": 0.3, "code": 0.2}, samples=samples * 6 // 10),
        Stage(name="second", mix={"ja": 0.8, "en": 0.2}, samples=samples * 3 // 10),
        Stage(name="third", take={"code": Amount(samples=samples // 20), "ja": Amount(samples=samples // 20)}),
    ]
    sources = {name: StagedSource(path=str(folder / name)) for name in SOURCES}
    data = DataConfig(sequence_length=LENGTH, tokenizer="none", sources=sources, stages=stages)

    def work() -> None:
        plan = make_plan(
            data,
            TrainConfig(global_batch_size=100),
            {name: SourceSize(tokens, name) for name in SOURCES},
        )
        files = {name: TokenFile(folder / SOURCES[0], tokens) for name in SOURCES}
        read = PlannedSamples(plan, files, vocab_size=65536)
        for position in (0, plan.total_samples // 2, plan.total_samples - 1):
            assert len(read[position]["tokens"]) == LENGTH

    return work


def open_gpt_dataset(folder: Path, samples: int) -> Callable[[], None]:
    """Prepare to build, or read, the index of megatron-core for one epoch of the first source."""
    import torch.distributed as dist
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    class Vocabulary:
        """What the data set asks of a tokenizer."""

        eod, vocab_size, unique_identifiers = 0, 65536, {"tokenizer": "none"}

    def work() -> None:
        prefix = str(folder / SOURCES[0])
        indexed = IndexedDataset(prefix, multimodal=False, mmap=True)
        config = GPTDatasetConfig(
            random_seed=1,
            sequence_length=LENGTH,
            blend=([prefix], None),
            split="1,0,0",
            path_to_cache=str(folder / "cache"),
            tokenizer=Vocabulary(),  # type: ignore[arg-type]
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        documents = np.arange(indexed.sequence_lengths.shape[0], dtype=np.int32)
        dataset = GPTDataset(indexed, prefix, documents, None, Split.train, config)
        assert len(dataset[0]["tokens"]) == LENGTH

    return work


JOBS: dict[str, Callable[[Path, int], Callable[[], None]]] = {"ours": open_plan, "core": open_gpt_dataset}


def measured_here(job: str, folder: Path, samples: int) -> None:
    """Do one job in this process; print its seconds and the bytes of memory it took at most."""
    work = JOBS[job](folder, samples)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before, begin = _kilobytes("VmRSS"), time.perf_counter()
    work()
    seconds = time.perf_counter() - begin
    print(json.dumps([seconds, 1024 * (_kilobytes("VmHWM") - before)]))


def _kilobytes(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def run_job(job: str, folder: Path, samples: int) -> tuple[float, float]:
    """Seconds and bytes of a job in a process of its own."""
    command = [sys.executable, __file__, "--job", job, str(folder), str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def measure(folder: Path, documents: int, samples: int, rounds: int) -> list[list[str]]:
    """The rows of the table, each the median of `rounds`."""
    print("writing the sources", file=sys.stderr)
    tokens = write_source(folder / SOURCES[0], documents)
    (folder / "tokens.json").write_text(json.dumps(tokens))
    rows: dict[str, list[Any]] = {}
    for _ in range(rounds):
        for name, job in (
            (f"a plan of {samples:.0e} samples over 3 x {documents:.0e} documents", "ours"),
            (f"GPTDataset of {documents:.0e} documents, a new index", "core"),
            ("GPTDataset, the index is there", "core"),
        ):
            rows.setdefault(name, []).append(run_job(job, folder, samples))
        for path in (folder / "cache").iterdir():
            path.unlink()
    return [
        [name, f"{statistics.median(s for s, _ in found):.2f}", f"{statistics.median(m for _, m in found) / 1e6:,.0f}"]
        for name, found in rows.items()
    ]


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="timed runs of each (default 3)")
    parser.add_argument("--tiny", action="store_true", help="few documents and samples, to see that it runs")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    parser.add_argument("--job", nargs=3, metavar=("JOB", "FOLDER", "SAMPLES"), help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.job:
        measured_here(o.job[0], Path(o.job[1]), int(o.job[2]))
        return
    documents, samples, rounds = (10_000, 100_000, 1) if o.tiny else (10_000_000, 1_000_000_000, o.rounds)
    with tempfile.TemporaryDirectory(prefix="data-plan-") as folder:
        rows = measure(Path(folder), documents, samples, rounds)
    text = f"{hardware()}. {versions('megatron-core', 'numpy')}. Median of {rounds}.\n\n{markdown_table(COLUMNS, rows)}"
    print(text)
    if o.record:
        record("Opening a data plan" + (" (tiny)" if o.tiny else ""), text)


if __name__ == "__main__":
    main()
