"""Data for benchmarks of whole runs: the documentation of the running Python, prepared by the tools."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tool(name: str, *arguments: object) -> None:
    """Run a command line of the framework; its last words if it fails."""
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")


def prepare(folder: Path, vocabulary: int) -> None:
    """Write `tokenizer` and `data/train`, `data/validation` into `folder`."""
    corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer"
    tool("corpus", "--kind", "documentation", "--output", corpus)
    tool("tokenizer", "train", corpus, "--output", tokenizer, "--vocab-size", vocabulary)
    tool("preprocess", corpus, "--tokenizer", tokenizer, "--output", folder / "data")
