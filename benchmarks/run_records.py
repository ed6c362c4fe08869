"""What a run has left behind for people: its metrics file, TensorBoard's and W&B's files, without what a clock says."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_OF_THE_CLOCK = (
    "seconds_per_step",
    "tokens_per_second",
    "tflops_per_device",
    "memory_bytes",
    "time",
    "step_seconds",
    "figures",
)
_PANELS = ("train/", "validation/", "moe/", "sources/", "source/")
"""Groups of panels that hold no times."""
_BLOCK = 1 << 15
"""Bytes of a block of W&B's file."""


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The reports of training steps and validations, line by line as they stand in the file."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    reports = [record for record in records if "loss" in record or "validation_loss" in record]
    return [{key: value for key, value in one.items() if key not in _OF_THE_CLOCK} for one in reports]


def tensorboard(directory: Path) -> dict[tuple[str, int], Any]:
    """Each curve's value at each step, as TensorBoard shows it: a start forgets what was shown of later steps."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown: dict[tuple[str, int], Any] = {}
    for path in sorted(directory.glob("events.out.tfevents.*")):
        for content in _tfrecords(path.read_bytes()):
            record = Event.FromString(content)
            if record.HasField("session_log") and record.session_log.status == SessionLog.START:
                shown = {key: value for key, value in shown.items() if key[1] < record.step}
            for value in record.summary.value:
                if value.tag.startswith(_PANELS):
                    key, figure = (value.tag, record.step), value.SerializeToString()
                    if shown.setdefault(key, figure) != figure:
                        raise SystemExit(f"{directory}: {value.tag} of step {record.step} is shown twice")
    return shown


def wandb(directory: Path) -> dict[tuple[str, int], str]:
    """Each panel's value at each step, as JSON, over the folders of all starts, which are one run; no step twice."""
    from wandb.proto.wandb_internal_pb2 import Record

    shown: dict[tuple[str, int], str] = {}
    files = sorted((directory / "wandb").glob("*run-*/*.wandb"))
    if len({path.name for path in files}) > 1:
        raise SystemExit(f"{directory}: W&B has several runs: {', '.join(path.parent.name for path in files)}")
    for path in files:
        for content in _leveldb_records(path.read_bytes()):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") != "history":
                continue
            step = record.history.step.num
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                if name.startswith(_PANELS):
                    if (name, step) in shown:
                        raise SystemExit(f"{path}: {name} of step {step} was recorded before")
                    shown[name, step] = item.value_json
    return shown


def _tfrecords(content: bytes) -> Iterator[bytes]:
    """The whole records of a file: length, its checksum, content, its checksum."""
    at = 0
    while at + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        if at + 16 + length > len(content):
            return  # the process was killed within it
        yield content[at + 12 : at + 12 + length]
        at += 16 + length


def _leveldb_records(content: bytes) -> Iterator[bytes]:
    """The whole records of a file in LevelDB's log format, whose first bytes are W&B's own."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        if _BLOCK - at % _BLOCK < 7:
            at += _BLOCK - at % _BLOCK
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + 7 : at + 7 + length]
        if at + 7 + length > len(content):
            return
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""
