"""Data for benchmarks of whole runs: the documentation of the running Python, prepared by the tools."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tool(name: str, *arguments: object) -> None:
    """Run a command line of the framework; its last words if it fails."""
    _script(ROOT / "tools" / f"{name}.py", *arguments)


def _script(path: Path, *arguments: object) -> None:
    done = subprocess.run([sys.executable, path, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{path.stem} failed:\n{done.stderr[-2000:]}")


def prepare(folder: Path, vocabulary: int) -> None:
    """Write `tokenizer` and `data/train`, `data/validation` into `folder`."""
    corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer"
    tool("corpus", "--kind", "documentation", "--output", corpus)
    tool("tokenizer", "train", corpus, "--output", tokenizer, "--vocab-size", vocabulary)
    tool("preprocess", corpus, "--tokenizer", tokenizer, "--output", folder / "data")


def prepare_chats(folder: Path, length: int) -> None:
    """Write `chat` and `pairs` into `folder`, which `prepare` has filled, of at most `length` tokens a row."""
    examples = ROOT / "examples" / "chat"
    _script(examples / "python_chats.py", folder / "chats.jsonl")
    _script(examples / "rows.py", folder / "chats.jsonl", folder / "chats.jsonl", folder / "rows")
    how = ("--tokenizer", folder / "tokenizer", "--chat-template", examples / "template.jinja", "--bad-lines", "skip")
    rows, split = folder / "rows", ("--split", 0.9, 0.1, 0)
    tool(
        "preprocess", rows / "chats.jsonl", *how, *split, "--output", folder / "chat", "--chat", "--max-tokens", length
    )
    few = folder / "few_pairs.jsonl"
    few.write_text("".join((rows / "pairs.jsonl").read_text().splitlines(keepends=True)[:200]))
    tool("preprocess", few, *how, *split, "--output", folder / "pairs", "--preference", "--max-tokens", length // 2)
