#!/usr/bin/env python
"""Print what happened to a run: starts and layouts, steps passed over, spikes, rollbacks, changed keys.

  python tools/history.py runs/moe                  # of its newest checkpoint
  python tools/history.py runs/moe --json           # every figure, for other programs

It is read from the audit log that every checkpoint has. Steps are counted from 1, samples from 0 over the run.
"""

from megatron_ext.command import parse_command, run_command
from megatron_ext.config.base import PathName, config


@config
class HistoryOptions:
    """Options of this command."""

    run: PathName
    """Directory of a run, or one of its checkpoints."""
    json: bool = False
    """Print the entries as a JSON list instead of a table."""


def main() -> None:
    """Parse the command line and print."""
    o = parse_command(HistoryOptions, __doc__, positional=["run"])
    import json
    import sys

    from rich.console import Console
    from rich.table import Table

    from megatron_ext.training.guard.history import HEADER, history_rows, read_history

    checkpoint, entries = read_history(o.run)
    if o.json:
        print(json.dumps(entries, indent=2))
        return
    table = Table(
        *HEADER,
        box=None,
        title=f"{checkpoint}: {len(entries)} {'entry' if len(entries) == 1 else 'entries'}",
        title_justify="left",
    )
    for row in history_rows(entries):
        table.add_row(*row)
    # A file or a pipe takes long lines whole.
    Console(width=None if sys.stdout.isatty() else 400).print(table)


if __name__ == "__main__":
    run_command(main)
