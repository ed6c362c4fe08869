#!/usr/bin/env python
"""Tokenize documents into train, validation and test files for training. Interrupted, it goes on where it was.

python tools/preprocess.py corpus.jsonl ... --tokenizer DIR --output DIR
"""

import os

from pydantic import Field

from megatron_ext.command import ending_on_sigterm, parse_command, run_command
from megatron_ext.config.base import PathName, config


@config
class PreprocessOptions:
    """Options of this command."""

    inputs: list[PathName] = Field(min_length=1)
    """Text: .jsonl (a document a line), .json (an array of documents), .txt (a document a file), these as .gz, or
    folders of them; links are followed, and what a folder has of other kinds is named."""
    tokenizer: PathName
    """Directory of the tokenizer: any that transformers' AutoTokenizer loads. Its eos_token ends every document."""
    output: PathName
    """Directory to write: train, validation and test as .bin and .idx, dataset.json, and manifest.json with sums."""
    text_key: str = "text"
    """Where the text stands in the object of a document."""
    split: list[float] = Field(default_factory=lambda: [0.98, 0.01, 0.01])
    """Shares of train, validation and test, by a hash of each document."""
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    """Processes."""
    force: bool = False
    """Replace an existing output."""


def main() -> None:
    """Parse the command line and prepare the data."""
    o = parse_command(PreprocessOptions, __doc__, positional=["inputs"])
    from megatron_ext.data.prepare.preprocess import preprocess
    from megatron_ext.progress import byte_progress

    with ending_on_sigterm(), byte_progress("tokenizing") as progress:
        summary = preprocess(
            o.inputs,
            o.tokenizer,
            o.output,
            text_key=o.text_key,
            split=o.split,
            workers=o.workers,
            force=o.force,
            progress=progress,
        )
    for name, counts in summary.items():
        print(f"{o.output}/{name}: {counts.documents:,} documents, {counts.tokens:,} tokens")


if __name__ == "__main__":
    run_command(main)
