#!/usr/bin/env python
"""Check that a checkpoint, an export or prepared data is what was written: every file, by size and checksum.

  python tools/verify_checkpoint.py runs/moe                 # the newest checkpoint of a run
  python tools/verify_checkpoint.py runs/moe/iter_0000100 hf-model data/mine

To compare two models with each other, see tools/verify.py.
"""

from pydantic import Field

from megatron_ext.command import parse_command, run_command
from megatron_ext.config.base import PathName, config


@config
class VerifyCheckpointOptions:
    """Options of this command."""

    directories: list[PathName] = Field(min_length=1)
    """What to check."""
    write: bool = False
    """List the files as they are now instead: for directories of older versions, or after a change that is meant."""


def main() -> None:
    """Parse the command line and check."""
    o = parse_command(VerifyCheckpointOptions, __doc__, positional=["directories"])
    from megatron_ext.checkpoint.examine import examine, write_anew

    for directory in o.directories:
        found = write_anew(directory) if o.write else examine(directory)
        what = "listed as they are" if o.write else "as they were written"
        print(f"{found.directory}: {found.files} files, {found.bytes / 1e6:,.1f} MB, {what}")


if __name__ == "__main__":
    run_command(main)
