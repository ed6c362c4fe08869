"""The record of a run: a JSONL file of every report, also across interruptions."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends one JSON object a line. A run that continues from step n says so; what came after n is then void."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        if torn:  # the last writer was killed within a line, which must not swallow the next one
            self._file.write("\n")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append `record` and hand it to the operating system at once."""
        self._file.write(json.dumps(_finite(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    """`value` with non-finite numbers as words, which JSON has not."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return value


def _numbers(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The inverse of `_finite` for one object."""
    return {key: float(value) if value in ("nan", "inf", "-inf") else value for key, value in pairs}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The reports of a run in order of steps: of a step that was repeated after an interruption, the last one.

    Reports are told apart by what they hold: training steps have `loss`, validations `validation_loss`.
    """
    kept: list[dict[str, Any]] = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line, object_pairs_hook=_numbers)
        except json.JSONDecodeError:
            continue  # the last line of a process that was killed while writing
        if record.get("event") == "start":
            kept = [r for r in kept if r["iteration"] <= record["iteration"]]
        else:
            kept.append(record)
    return kept


def read_starts(path: str | Path) -> list[dict[str, Any]]:
    """What a run recorded each time it was started or continued, in order of time."""
    starts = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line, object_pairs_hook=_numbers)
        except json.JSONDecodeError:
            continue
        if record.get("event") == "start":
            starts.append(record)
    return starts
