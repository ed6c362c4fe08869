"""What every part of the GPU check uses: where its answers go, which device it is, and how an operation is timed."""

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

OUT = Path(os.environ.get("OUT", "build/gpu_check"))
"""Folder of all results."""
TINY = False
"""Tiny sizes, on CPU where there is no GPU."""
ANSWER: Path | None = None
"""Where this part's answer goes."""


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def keep(results: dict) -> None:
    """Leave what a part knows so far where the parent finds it, also when the part is ended."""
    if ANSWER is not None:
        ANSWER.with_suffix(".new").write_text(json.dumps(results, default=str))
        ANSWER.with_suffix(".new").rename(ANSWER)


def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(run, repeats: int = 10, warmup: int = 2) -> float:
    """Median milliseconds of `run`, by device events on CUDA."""
    cuda = torch.cuda.is_available()
    repeats, warmup = (repeats, warmup) if cuda else (2, 1)
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        if cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def machine() -> dict:
    """Versions, and the card."""
    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
    for name in ("megatron-core", "triton", "transformers", "transformer_engine", "pydantic", "pytest-xdist"):
        try:
            found[name] = importlib.metadata.version(name)
        except Exception:
            found[name] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "GiB": properties.total_memory / 2**30,
        }
        try:
            found["cudnn"] = torch.backends.cudnn.version()
        except RuntimeError as error:  # another one than torch was built with comes first in the loader's path
            found["cudnn"] = str(error).split(". ")[0]
        smi = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit",
            "--format=csv,noheader",
        ]
        found["nvidia-smi"] = subprocess.run(smi, capture_output=True, text=True).stdout.strip()
    return found


class Group:
    """Stands for a process group of one rank."""

    def size(self) -> int:
        """One."""
        return 1

    def rank(self) -> int:
        """The first."""
        return 0
