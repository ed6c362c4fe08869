#!/usr/bin/env python
"""Write a corpus that every machine has: documentation and sources of the running Python, as JSONL.

python tools/corpus.py --output corpus.jsonl
"""

from pydantic import Field

from megatron_ext.command import parse_command, run_command
from megatron_ext.config.base import PathName, config
from megatron_ext.data.python_corpus import Kind, write_python_corpus
from megatron_ext.files import require_writable


@config
class CorpusOptions:
    """Options of this command."""

    output: PathName = Field()
    """JSONL file to write."""
    kind: Kind = "all"
    """documentation: the topics of help() and what the sources say of themselves (docstrings); code: the sources; all:
    the topics and the sources."""


def main() -> None:
    """Parse the command line and write the corpus."""
    options = parse_command(CorpusOptions, __doc__)
    require_writable(options.output)
    documents, size = write_python_corpus(options.output, options.kind)
    print(f"{options.output}: {documents} documents, {size / 1e6:.1f} MB of text")


if __name__ == "__main__":
    run_command(main)
