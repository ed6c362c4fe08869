#!/usr/bin/env python
"""Train a tokenizer, or export a SentencePiece model for Hugging Face.

python tools/tokenizer.py train corpus.jsonl ... --output DIR --vocab-size 8192
python tools/tokenizer.py export tokenizer.model --output DIR
"""

import os
import sys
from pathlib import Path

from pydantic import Field

from megatron_ext.command import parse_command, run_command
from megatron_ext.config.base import config


@config
class TrainOptions:
    """Options of `train`."""

    inputs: list[str] = Field(min_length=1)
    """Text to train on: .jsonl, .txt or folders of them."""
    output: str
    """Directory to write: the SentencePiece model, and a Hugging Face fast tokenizer that encodes alike."""
    vocab_size: int = Field(default=32000, ge=300)
    """Tokens, including 256 bytes and 5 special ones."""
    text_key: str = "text"
    """Where the text stands in a line of JSONL."""
    max_lines: int = Field(default=1_000_000, ge=1000)
    """Lines to train on; of more an even sample is taken."""
    force: bool = False
    """Replace an existing output."""


@config
class ExportOptions:
    """Options of `export`."""

    model: str
    """SentencePiece model file."""
    output: str
    """Directory to write."""
    force: bool = False
    """Replace an existing output."""


def main() -> None:
    """Parse the command line and train or export."""
    action, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if action == "train":
        o = parse_command(TrainOptions, __doc__, positional=["inputs"], argv=arguments)
        from megatron_ext.data.tokenizer import train_tokenizer

        limits = {"text_key": o.text_key, "max_lines": o.max_lines, "threads": os.cpu_count() or 1}
        tokenizer = train_tokenizer(o.inputs, o.output, o.vocab_size, force=o.force, **limits)
    elif action == "export":
        e = parse_command(ExportOptions, __doc__, positional=["model"], argv=arguments)
        from megatron_ext.data.tokenizer import write_tokenizer

        tokenizer = write_tokenizer(Path(e.model).read_bytes(), e.output, [], force=e.force)
    else:
        print(f"{__doc__}\nOptions: tokenizer.py train --help, tokenizer.py export --help")
        sys.exit(0 if action in ("-h", "--help") else 2)
    print(f"{tokenizer.directory}: {tokenizer.vocab_size} tokens, end of document is {tokenizer.eod}")


if __name__ == "__main__":
    run_command(main)
