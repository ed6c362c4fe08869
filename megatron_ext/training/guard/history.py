"""What happened to a run from its first step on, read from the audit log of its newest checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.find import require_checkpoint
from megatron_ext.checkpoint.state_file import STATE_FILE, read_scalars
from megatron_ext.errors import CheckpointError
from megatron_ext.foreign import reading
from megatron_ext.training.guard.audit import AUDIT_KEY, check_entries

HEADER = ("step", "when", "what", "samples", "")


def read_history(path: str | Path) -> tuple[Path, list[dict[str, Any]]]:
    """The checkpoint at `path`, or the newest of a run, and its audit log, oldest entry first.

    Raises:
        CheckpointError: there is none, or it is damaged, or older than audit logs.
    """
    checkpoint = require_checkpoint(path)
    saved = read_scalars(checkpoint)
    if AUDIT_KEY not in saved:
        raise CheckpointError(f"{checkpoint}: {STATE_FILE} has no {AUDIT_KEY}: it is of an older version, or no run's")
    with reading(checkpoint / STATE_FILE, CheckpointError):
        return checkpoint, check_entries(saved[AUDIT_KEY])


def history_rows(entries: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """A row for each entry, under `HEADER`; steps of one kind and reason that follow each other are one row."""
    rows: list[list[Any]] = []
    for entry in entries:
        what = (entry["kind"], entry["text"])
        samples = (entry.get("first_sample"), entry.get("last_sample"))
        if rows and samples[0] is not None and rows[-1][2:4] == list(what) and rows[-1][1] == entry["step"] - 1:
            rows[-1][1], rows[-1][4][1] = entry["step"], samples[1]
        else:
            rows.append([entry["step"], entry["step"], *what, list(samples), entry["time"]])
    for first, last, kind, text, (begin, end), when in rows:
        steps = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        read = "" if begin is None else f"{begin:,} to {end:,}"
        yield steps, datetime.fromtimestamp(when).strftime("%Y-%m-%d %H:%M:%S"), kind, read, text
