"""What every benchmark says besides its figures: date, machine and versions; and how tables are printed and kept."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))


def hardware() -> str:
    """The machine in one line."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [f"{_cpu_model()}, {cores} cores, {gigabytes:.0f} GiB"]
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        parts.append(f"{torch.cuda.device_count()} x {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    else:
        parts.append(f"torch's best CPU instructions: {torch.backends.cpu.get_cpu_capability()}")
    return "; ".join(parts)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions(*packages: str) -> str:
    """Python, the packages and this repository's commit in one line."""
    parts = [f"Python {platform.python_version()}"]
    parts += [f"{name} {importlib.metadata.version(name)}" for name in packages]
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=8"]
    described = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ", ".join([*parts, f"commit {described or 'unknown'}"])


def record(title: str, text: str) -> None:
    """Append a dated section to RESULTS.md."""
    before = RESULTS.read_text() if RESULTS.exists() else "# Results\n\nWritten by the scripts beside this file.\n"
    RESULTS.write_text(f"{before.rstrip()}\n\n## {title}, {datetime.date.today()}\n\n{text.strip()}\n")
