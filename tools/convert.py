#!/usr/bin/env python
"""Convert a checkpoint between Megatron and Hugging Face; the direction follows from what SOURCE is.

  python tools/convert.py MEGATRON_CHECKPOINT HF_DIRECTORY
  python tools/convert.py HF_DIRECTORY MEGATRON_CHECKPOINT

One process, no GPU, a few tensors in memory. Every tensor is accounted for, or nothing is written.
"""

from typing import Literal

from megatron_ext.command import parse_command, run_command
from megatron_ext.config.base import config


@config
class ConvertOptions:
    """Options of this command."""

    source: str
    """Megatron checkpoint (or a directory of them: the newest is taken), or Hugging Face directory."""
    target: str
    """Directory to write."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Convert the weights. Default: keep them as they are."""
    tokenizer: str | None = None
    """Tokenizer to put into a Hugging Face export. Default: the one of the training run."""
    force: bool = False
    """Replace an existing target."""


def main() -> None:
    """Parse the command line and convert."""
    o = parse_command(ConvertOptions, __doc__, positional=["source", "target"])
    from megatron_ext.conversion.convert import convert
    from megatron_ext.progress import byte_progress

    with byte_progress("converting") as progress:
        done = convert(o.source, o.target, dtype=o.dtype, tokenizer=o.tokenizer, force=o.force, progress=progress)
    print(f"{o.target}: {done.direction}, {done.tensors:,} tensors, {done.bytes / 1e6:,.1f} MB")
    print(f"architecture: {done.why}")


if __name__ == "__main__":
    run_command(main)
