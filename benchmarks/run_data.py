"""Data for benchmarks of whole runs: the documentation of the running Python, prepared by the tools."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def prepare(folder: Path, vocabulary: int) -> None:
    """Write `tokenizer` and `data/train`, `data/validation` into `folder`."""
    corpus, tokenizer = str(folder / "corpus.jsonl"), str(folder / "tokenizer")
    for tool, *arguments in (
        ("corpus", "--kind", "documentation", "--output", corpus),
        ("tokenizer", "train", corpus, "--output", tokenizer, "--vocab-size", str(vocabulary)),
        ("preprocess", corpus, "--tokenizer", tokenizer, "--output", str(folder / "data")),
    ):
        command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
