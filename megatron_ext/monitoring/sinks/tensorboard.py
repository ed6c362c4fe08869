"""TensorBoard: event files that a resumed run goes on with, no step twice."""

import logging
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_ext.config.yaml_text import dump_yaml
from megatron_ext.errors import EnvironmentFault
from megatron_ext.monitoring.events import STARTED, Event
from megatron_ext.monitoring.sources import ValidationReport, validation_panels
from megatron_ext.monitoring.step_report import StepRecord, step_panels_of

log = logging.getLogger(__name__)

_HPARAMS = ("parallel", "precision", "train", "optimizer", "schedule")
"""Sections of the configuration by whose numbers and words TensorBoard compares runs."""


def require_tensorboard() -> None:
    """Raise EnvironmentFault where the library that knows TensorBoard's format is not installed."""
    try:
        import tensorboardX  # noqa: F401 - slow to import, and not needed where it is off
    except ImportError as error:
        raise EnvironmentFault(
            "logging.tensorboard_directory needs tensorboardX: pip install tensorboardX (or megatron-ext[tensorboard])"
        ) from error


class TensorboardSink:
    """Writes event files to `directory`.

    tensorboardX makes the records; its writer is left out, whose queue blocks for ever where its thread has died of a
    full disk.

    Args:
        iteration: the step from which the run goes on; TensorBoard then forgets what it was shown of later ones.
        configuration: of the run.

    Raises:
        EnvironmentFault: tensorboardX is not installed.
    """

    def __init__(self, directory: Path, iteration: int, configuration: Mapping[str, Any]) -> None:
        require_tensorboard()
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import SessionLog

        self._summary: Any = summary
        self._stage: str | None = None
        self._file: Any = None
        # TensorBoard reads the files of a directory by their names, so that the seconds come first.
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = open(directory / name, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            self._give_up(error)
        self._append(0, file_version="brain.Event:2")
        # Of the steps from this one on, all that came before is forgotten.
        self._append(iteration + 1, session_log=SessionLog(status=SessionLog.START))
        hparams = dict(_leaves({name: configuration[name] for name in _HPARAMS if name in configuration}))
        for described in self._summary.hparams(hparams, {"train/loss": 0, "validation/loss": 0}):
            self._append(iteration, summary=described)
        self._add(iteration, [self._summary.text("run", _as_code(dump_yaml(dict(configuration))))])

    def step(self, record: StepRecord) -> None:
        """Every number as a curve, the load of experts as histograms over time, the stage where it changes."""
        parts = []
        for name, value in step_panels_of(record.values).items():
            if isinstance(value, list):
                parts.append(self._load(name, value))
            elif isinstance(value, int | float):
                parts.append(self._scalar(name, value))
        if record.report.stage is not None and record.report.stage != self._stage:
            self._stage = record.report.stage
            parts.append(self._summary.text("stage", self._stage))
        self._add(record.report.iteration, parts)

    def validation(self, iteration: int, report: ValidationReport) -> None:
        """Loss and perplexity, in all and by source."""
        self._add(iteration, [self._scalar(name, value) for name, value in validation_panels(report).items()])

    def event(self, event: Event) -> None:
        """A text by its kind, and its numbers."""
        if event.kind != STARTED:
            numbers = [self._scalar(name, value) for name, value in event.panels.items()]
            self._add(event.iteration, [self._summary.text(f"events/{event.kind}", event.text), *numbers])

    def flush(self) -> None:
        """Nothing waits."""

    def close(self, *, failed: bool) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _scalar(self, name: str, value: float) -> Any:
        from tensorboardX.proto.summary_pb2 import Summary

        # Without the description of itself that tensorboardX adds to each: it takes ten times as long.
        return Summary(value=[Summary.Value(tag=name, simple_value=value)])

    def _load(self, name: str, shares: list[float]) -> Any:
        """A histogram in which the share of the i-th expert is what is between i and i + 1."""
        middles = [number + 0.5 for number in range(len(shares))]
        total = sum(middle * share for middle, share in zip(middles, shares, strict=True))
        squares = sum(middle**2 * share for middle, share in zip(middles, shares, strict=True))
        limits = [float(number + 1) for number in range(len(shares))]
        return self._summary.histogram_raw(name, 0, len(shares), sum(shares), total, squares, limits, shares)

    def _add(self, iteration: int, parts: list[Any]) -> None:
        """One record with all of `parts`."""
        from tensorboardX.proto.summary_pb2 import Summary

        values = [value for part in parts for value in part.value]
        self._append(iteration, summary=Summary(value=values))

    def _append(self, iteration: int, **content: Any) -> None:
        """Hand a record to the operating system at once; TFRecord: length, its checksum, content, its checksum."""
        from tensorboardX.proto.event_pb2 import Event as Record
        from tensorboardX.record_writer import masked_crc32c

        if self._file is None:
            return
        data = Record(step=iteration, wall_time=time.time(), **content).SerializeToString()
        length = struct.pack("<Q", len(data))
        frame = length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
        try:
            end = self._file.tell()
            if self._file.write(frame) < len(frame):
                self._file.truncate(end)  # a part of a record would end what TensorBoard reads
                raise OSError(0, "it takes only a part of a record")
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning("TensorBoard's files take no more reports: %s; everything is in the metrics file", error.strerror)
        if self._file is not None:
            self._file.close()
        self._file = None


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers and words of nested mappings, by their keys."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, bool | int | float | str):
        yield key, value


def _as_code(text: str) -> str:
    """`text` as Markdown that keeps its lines."""
    return "".join(f"    {line}\n" for line in text.splitlines())
