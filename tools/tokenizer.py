#!/usr/bin/env python
"""Train a tokenizer, or export a SentencePiece model for Hugging Face.

python tools/tokenizer.py train corpus.jsonl ... --output DIR --vocab-size 8192
python tools/tokenizer.py export tokenizer.model --output DIR

Both write a directory that tools/preprocess.py takes (--tokenizer DIR), and training too (data.tokenizer): the
SentencePiece model beside a fast tokenizer for Hugging Face, written only once both were seen to encode texts alike.
The tokenizer of a published model needs neither: give its directory to tools/preprocess.py as it is.
"""

import difflib
import itertools
import os
import sys
from pathlib import Path
from typing import Any

from pydantic import Field

from megatron_ext.command import ending_on_sigterm, parse_command, run_command
from megatron_ext.config.base import PathName, config, fields_of
from megatron_ext.errors import ConfigError


@config
class TrainOptions:
    """Options of `train`."""

    inputs: list[PathName] = Field(min_length=1)
    """Text to train on: .jsonl, .json, .txt, these as .gz, or folders of them."""
    output: PathName
    """Directory to write: the SentencePiece model, and a Hugging Face fast tokenizer that encodes alike."""
    vocab_size: int = Field(default=32000, ge=300)
    """Tokens, including 256 bytes and 5 special ones."""
    text_key: str = "text"
    """Where the text stands in a line of JSONL."""
    max_lines: int = Field(default=1_000_000, ge=1000)
    """Lines to train on; of more an even sample is taken."""
    character_coverage: float = Field(default=0.9995, ge=0.98, le=1)
    """Share of the text's characters that get a token each; the rarer ones are written in bytes. For languages of many
    characters a lower one leaves more of a small vocabulary to words."""
    force: bool = False
    """Replace an existing output."""


@config
class ExportOptions:
    """Options of `export`."""

    model: PathName
    """SentencePiece model file."""
    output: PathName
    """Directory to write."""
    text: list[PathName] = Field(default_factory=list)
    """More text to prove it on (as for train): the first 500 documents."""
    force: bool = False
    """Replace an existing output."""


COMMANDS: dict[str, Any] = {"train": TrainOptions, "export": ExportOptions}
_PROOF_TEXTS = 500


def main() -> None:
    """Parse the command line and train or export."""
    action, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if action in ("", "-h", "--help"):
        print(__doc__)
        for name, options in COMMANDS.items():
            print(f"{name}: {', '.join(fields_of(options)).replace('_', '-')}")
        print("\nWhat they mean: tools/tokenizer.py train --help, tools/tokenizer.py export --help")
        sys.exit(2 if action == "" else 0)
    if action not in COMMANDS:
        close = difflib.get_close_matches(action, COMMANDS, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"tools/tokenizer.py {action}: no such command{meant} It has: {', '.join(COMMANDS)}")
    if action == "train":
        o = parse_command(TrainOptions, __doc__, positional=["inputs"], argv=arguments)
        from megatron_ext.data.tokenizer import train_tokenizer

        with ending_on_sigterm():
            tokenizer = train_tokenizer(
                o.inputs,
                o.output,
                o.vocab_size,
                text_key=o.text_key,
                max_lines=o.max_lines,
                character_coverage=o.character_coverage,
                threads=os.cpu_count() or 1,
                force=o.force,
            )
    else:
        e = parse_command(ExportOptions, __doc__, positional=["model"], argv=arguments)
        from megatron_ext.data.prepare.corpus import corpus_files
        from megatron_ext.data.prepare.documents import read_documents
        from megatron_ext.data.tokenizer import write_tokenizer

        texts = itertools.islice(read_documents(corpus_files(e.text)), _PROOF_TEXTS) if e.text else []
        with ending_on_sigterm():
            tokenizer = write_tokenizer(Path(e.model).read_bytes(), e.output, texts, force=e.force, source=e.model)
    print(f"{tokenizer.directory}: {tokenizer.vocab_size} tokens, end of document is {tokenizer.eod}")


if __name__ == "__main__":
    run_command(main)
