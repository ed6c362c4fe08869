#!/usr/bin/env python
"""Tokenize documents into train, validation and test files for training. Interrupted, it goes on where it was.

python tools/preprocess.py corpus.jsonl ... --tokenizer DIR --output DIR
"""

import os
from typing import Literal

from pydantic import Field

from megatron_ext.command import ending_on_sigterm, parse_command, run_command
from megatron_ext.config.base import PathName, config


@config
class PreprocessOptions:
    """Options of this command."""

    inputs: list[PathName] = Field(min_length=1)
    """Text: .jsonl (a document a line), .json (an array of documents), .txt (a document a file), these as .gz or .zst,
    .parquet, .arrow (of the datasets library), or folders of them; links are followed, and what a folder has of other
    kinds is named."""
    tokenizer: PathName
    """Directory of the tokenizer: any that transformers' AutoTokenizer loads. Its eos_token ends every document."""
    output: PathName
    """Directory to write: train, validation and test as .bin and .idx, dataset.json, and manifest.json with sums."""
    text_key: str = "text"
    """Where the text stands in the object of a document; the column of a table."""
    split: list[float] = Field(default_factory=lambda: [0.98, 0.01, 0.01])
    """Shares of train, validation and test, by a hash of each document."""
    order: Literal["random", "file"] = "random"
    """Of the documents in the output: random, or that of the text, for a curriculum that was sorted."""
    bad_lines: Literal["stop", "skip"] = "stop"
    """A line that cannot be read ends the command, or is counted, said and left out."""
    min_characters: int = Field(default=0, ge=0)
    """Shorter documents are left out."""
    max_characters: int | None = Field(default=None, ge=1)
    """Longer documents are left out."""
    max_repetition: float | None = Field(default=None, ge=0, le=1)
    """Documents are left out in which more than this share of all runs of 16 characters stood before."""
    deduplicate: bool = False
    """Keep one of the documents with the same text, by hashes of 128 bits."""
    filters: list[str] = Field(default_factory=list)
    """Filters of your own, as module:Class: called with each text, they return the text or None (see docs/data.md)."""
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    """Processes."""
    force: bool = False
    """Replace an existing output."""


def main() -> None:
    """Parse the command line and prepare the data."""
    o = parse_command(PreprocessOptions, __doc__, positional=["inputs"])
    from megatron_ext.data.prepare.preprocess import preprocess
    from megatron_ext.data.prepare.shard_work import TextOptions
    from megatron_ext.progress import byte_progress

    options = TextOptions(
        text_key=o.text_key,
        split=tuple(o.split),
        order=o.order,
        bad_lines=o.bad_lines,
        min_characters=o.min_characters,
        max_characters=o.max_characters,
        max_repetition=o.max_repetition,
        deduplicate=o.deduplicate,
        filters=tuple(o.filters),
    )
    with ending_on_sigterm(), byte_progress("tokenizing") as progress:
        summary = preprocess(
            o.inputs, o.tokenizer, o.output, options=options, workers=o.workers, force=o.force, progress=progress
        )
    for name, counts in summary.items():
        print(f"{o.output}/{name}: {counts.documents:,} documents, {counts.tokens:,} tokens")


if __name__ == "__main__":
    run_command(main)
