#!/usr/bin/env python
"""Merge several models of one shape into one: checkpoint averaging, task arithmetic, TIES, DARE.

  python tools/average.py runs/moe runs/averaged --last 3
  python tools/average.py A B C MERGED --weights 0.5 0.25 0.25
  python tools/average.py CODE MATH MERGED --method ties --base PRETRAINED --density 0.3

Models are Megatron checkpoints or Hugging Face directories; so is the result (--to hf).
"""

from megatron_ext.command import ending_on_sigterm, parse_command, prefer_huge_pages, run_command
from megatron_ext.merging.options import AverageOptions


def main() -> None:
    """Parse the command line and merge."""
    o = parse_command(AverageOptions, __doc__, positional=["sources", "target"])
    prefer_huge_pages()
    from megatron_ext.merging.average import average
    from megatron_ext.progress import byte_progress

    with ending_on_sigterm(), byte_progress("merging") as progress:
        made = average(o, progress)
    print(f"{o.target}: {o.method.kind}, {made.written.bytes / 1e6:,.1f} MB")
    for name, value in made.perplexities.items():
        print(f"  perplexity {value:10.4g}  {name}")


if __name__ == "__main__":
    run_command(main)
