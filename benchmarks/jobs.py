"""Jobs in processes of their own: what each takes in seconds, in CPU seconds and in memory, and what it wrote."""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Measured:
    """One row of the table."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Seconds of all threads, which others' load disturbs least."""
    peak: int = 0
    """Most bytes resident in its process, libraries included."""


def job_parser(description: str | None, *, rounds: int, gigabytes: int) -> argparse.ArgumentParser:
    """The options of a benchmark of jobs; `--job` is how it starts itself for one of them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=rounds, metavar="N", help=f"timed runs of each (default {rounds})"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="most threads of a job (default 2)")
    parser.add_argument(
        "--directory", metavar="DIR", help=f"where to write up to {gigabytes} GB (default: a temporary folder)"
    )
    parser.add_argument("--tiny", action="store_true", help="models of a few MB, to see that it runs")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    parser.add_argument("--job", nargs=3, metavar=("JOB", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    return parser


@contextmanager
def reported() -> Iterator[None]:
    """Time what is done inside and print it for `run_job`; what was done before, such as imports, does not count."""
    begin, before = time.perf_counter(), time.process_time()
    yield
    seconds, cpu = time.perf_counter() - begin, time.process_time() - before
    print(json.dumps([seconds, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


def run_job(script: str, row: Measured, job: str, source: str, target: Path, workers: int) -> int:
    """Run one job of `script`, remove what it wrote beside and below `target`, and return the bytes of the latter."""
    arguments = ["--job", job, source, str(target), "--workers", str(workers)]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    seconds, cpu, peak = json.loads(done.stdout.splitlines()[-1])
    row.seconds.append(seconds)
    row.cpu.append(cpu)
    row.peak = max(row.peak, peak)
    written = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    shutil.rmtree(target)
    target.with_name(target.name + ".yaml").unlink(missing_ok=True)
    threads = f"{workers} worker{'s' if workers > 1 else ''}"
    print(f"  {job}, {threads}: {seconds:.2f} s, CPU {cpu:.2f} s, {peak / 2**20:.0f} MiB", file=sys.stderr)
    return written
