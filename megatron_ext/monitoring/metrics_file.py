"""The record of a run: a JSONL file of every report, also across interruptions."""

import errno
import json
import logging
import math
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from megatron_ext.files import open_regular, write_bytes
from megatron_ext.monitoring.events import EVALUATION

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
"""Its name, where the run gives none."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LONGEST = 1 << 24
"""Bytes of a line: what a disk full of zeros left is read in bounded memory."""


class MetricsFile:
    """Appends one JSON object a line; never ends the run because the disk is full.

    Args:
        path: the file.
        iteration: the step from which the run goes on. Reports of later steps, which the run will make again, are moved
            to `<name>.superseded.jsonl`; a line within which a process was killed is dropped.
    """

    def __init__(self, path: Path, iteration: int | None = None) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._failing = False
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if iteration is not None and path.is_file():
                _cut(path, iteration)
            self._open()
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._warn(error)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append `record` and hand it to the operating system at once; where that fails, warn once."""
        line = (json.dumps(_finite(record)) + "\n").encode()
        end = 0
        try:
            file = self._file or self._open()
            end = file.tell()
            while line:
                line = line[file.write(line) :]
            self._failing = False
        except OSError as error:
            self._warn(error)
            if self._file is not None and self._file.tell() > end:
                self._file.truncate(end)  # half a line
                self._file.seek(end)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _open(self) -> BinaryIO:
        # Unbuffered, so that a failure belongs to the line it concerns.
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        if _is_torn(self._path):  # the last writer was killed within a line, which must not swallow the next one
            self._file.write(b"\n")
        return self._file

    def _warn(self, error: OSError) -> None:
        if not self._failing:
            log.warning("%s: reports are lost until it can be written: %s", self._path, error.strerror)
        self._failing = True


def _is_torn(path: Path) -> bool:
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - 1, 0))
        return size > 0 and file.read() != b"\n"


_OF_STEPS = (
    *("start", "skip", "nonfinite", "spike", "lever", "stage", "checkpoint", "checkpoint_copied", "gradients"),
    EVALUATION,
)
"""Events that happen again where steps are made again; others, such as a failure, have happened once for all."""


def _cut(path: Path, iteration: int) -> None:
    """Leave in the file at `path` what led to step `iteration`, each step once; the rest goes to a file beside it."""
    kept: list[tuple[int, bytes, bool]] = []
    void: list[bytes] = []
    is_torn = False

    def drop_after(step: int) -> None:
        nonlocal kept
        void.extend(line for at, line, is_of_steps in kept if is_of_steps and at > step)
        kept = [(at, line, is_of_steps) for at, line, is_of_steps in kept if not is_of_steps or at <= step]

    newest = -1
    for line, record in _lines(path):
        at = record.get("iteration") if isinstance(record, dict) else None
        if not isinstance(at, int) or not line.endswith(b"\n"):
            is_torn = True
            continue
        event = record.get("event")
        if event == "start":
            drop_after(at)
        elif event is None and "loss" in record:
            if at <= newest:  # the run had gone back
                drop_after(at - 1)
            newest = at
        kept.append((at, line, event is None or event in _OF_STEPS))
    drop_after(iteration)
    if void:
        with open(path.with_name(f"{path.stem}.superseded.jsonl"), "ab") as aside:
            aside.writelines(void)
    elif not is_torn:
        return
    write_bytes(path, b"".join(line for _, line, _ in kept))


def _lines(path: Path) -> Iterator[tuple[bytes, Any]]:
    """Every line with the record in it; None where there is none. Longer ones than any record come in pieces."""
    with BufferedReader(open_regular(path)) as file:
        while line := file.readline(_LONGEST):
            yield line, parsed(line)


def _finite(value: Any) -> Any:
    """`value` with non-finite numbers as words, which JSON has not."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _numbers(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The inverse of `_finite` for one object."""
    words = ("nan", "inf", "-inf")
    return {key: float(value) if isinstance(value, str) and value in words else value for key, value in pairs}


class RunHistory:
    """What a metrics file says of a run, in order of steps: of a step that was repeated, the last report.

    Reports are told apart by what they hold: training steps have `loss`, validations `validation_loss`.
    """

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self.starts: list[dict[str, Any]] = []
        """What was recorded each time the run was started or continued, in order of time."""
        self.events: list[dict[str, Any]] = []
        """What else happened, in order of time."""

    def add(self, record: Any) -> None:
        """Take the next line; one that is none (a process was killed while writing) is left out."""
        at = record.get("iteration") if isinstance(record, dict) else None
        if not isinstance(at, int):
            return
        event = record.get("event")
        if event == "start":
            self.starts.append(record)
            self._go_back(at + 1)
        elif event is not None:
            self.events.append(record)
        else:
            if "loss" in record and self.reports and self.reports[-1]["iteration"] >= at:  # the run had gone back
                self._go_back(at)
            self.reports.append(record)

    def _go_back(self, step: int) -> None:
        """Forget what is made again: everything from `step` on."""
        self.reports = [r for r in self.reports if r["iteration"] < step]
        self.events = [e for e in self.events if e["iteration"] < step or e["event"] not in _OF_STEPS]


def read_history(path: str | Path) -> RunHistory:
    """What the metrics file at `path` says."""
    history = RunHistory()
    for _, record in _lines(Path(path)):
        history.add(record)
    return history


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The reports of a run in order of steps, as `RunHistory` has them."""
    return read_history(path).reports


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of the metrics file at `path`, line by line, without what a killed process left of one."""
    for _, record in _lines(path):
        if isinstance(record, dict) and isinstance(record.get("iteration"), int):
            yield record


def read_starts(path: Path) -> list[dict[str, Any]]:
    """What was recorded each time the run was started or continued; empty where there is no file at `path`."""
    return [one for one in _of_event(path, "start") if isinstance(one.get("iteration"), int)]


def read_evaluated(path: Path) -> set[int]:
    """The steps whose checkpoints were evaluated, by the metrics file at `path`; none where there is no file."""
    return {record["iteration"] for record in _of_event(path, EVALUATION) if "results" in record}


def is_untold(path: Path, iteration: int) -> bool:
    """Whether the metrics file at `path` is older than the checkpoint of step `iteration`, but has no word of it."""
    began_before = any(start["iteration"] < iteration for start in read_starts(path))
    return began_before and all(saved.get("iteration") != iteration for saved in _of_event(path, "checkpoint"))


def _of_event(path: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind of event, without reading the others."""
    if not path.is_file():
        return []
    mark = f'"event": "{kind}"'.encode()
    with BufferedReader(open_regular(path)) as file:
        found = [parsed(line) for line in iter(lambda: file.readline(_LONGEST), b"") if mark in line]
    return [record for record in found if isinstance(record, dict) and record.get("event") == kind]


def as_recorded(value: Mapping[str, Any]) -> Any:
    """`value` as it comes out of a metrics file that it was written to."""
    return parsed(json.dumps(_finite(value)).encode())


def parsed(line: bytes) -> Any:
    """The record in a line; None where there is none."""
    try:
        return json.loads(line, object_pairs_hook=_numbers)
    except (ValueError, RecursionError):
        return None
