"""How far the files of a W&B run reach that earlier starts have left on this machine."""

import contextlib
import json
import logging
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_HEADER, _BLOCK, _FRAGMENT_HEADER = 7, 1 << 15, 7
"""Bytes of the file's own header, of a block, and of the header of a part of a record: LevelDB's log format."""
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
"""Parts of a record."""
_WINDOW = 1 << 21
"""Bytes at the end of a file that are looked at first: files of long runs are large, and what counts is their end."""


def recorded_until(where: Path, run_id: str) -> int | None:
    """The last step that the files of W&B run `run_id` in `where` hold; -1 where they hold none.

    W&B's own process writes in blocks and ends with this one, so that after a kill the last steps are missing. None
    where there are no files, or W&B has changed their format.
    """
    files = sorted(where.glob(f"wandb/*run-*-{run_id}*/run-{run_id}.wandb"))
    try:
        return max(map(_last_step, files), default=None)
    except Exception as error:  # noqa: BLE001 - whatever W&B writes, training goes on
        log.warning("how far W&B's files in %s reach is not known (%s): steps may be missing there", where, error)
        return None


def remove_empty(where: Path, run_id: str) -> None:
    """Remove what offline starts of W&B run `run_id` have left that were killed before W&B wrote what run they are.

    Nothing is in them, and one such folder has `wandb sync` (0.31) send none.
    """
    for path in where.glob(f"wandb/offline-run-*-{run_id}*/run-{run_id}.wandb"):
        with contextlib.suppress(Exception):  # it is W&B's, and no reason to fail
            if not _names_run(path):
                shutil.rmtree(path.parent)


def _names_run(path: Path) -> bool:
    """Whether a file says what run it is of, as the first records of all do."""
    with open(path, "rb") as file:
        return any(_parsed(record).WhichOneof("record_type") == "run" for record in _records(file.read(_WINDOW), 0))


def _last_step(path: Path) -> int:
    """The last step in a file; -1 where it has none."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        window = _WINDOW
        while True:
            begin = max(size - window, 0) // _BLOCK * _BLOCK
            file.seek(begin)
            steps = [step for record in _records(file.read(), begin) if (step := _step(record)) is not None]
            if steps or begin == 0:
                return max(steps, default=-1)
            window *= 8


def _records(content: bytes, begin: int) -> Iterator[bytes]:
    """The whole records in `content`, which stands at `begin` of the file, a multiple of the block size."""
    at, parts = _HEADER if begin == 0 else 0, list[bytes]()
    is_inside = False
    while at + _FRAGMENT_HEADER <= len(content):
        room = _BLOCK - at % _BLOCK
        if room < _FRAGMENT_HEADER:
            at += room
            continue
        checksum, length = (
            int.from_bytes(content[at : at + 4], "little"),
            int.from_bytes(content[at + 4 : at + 6], "little"),
        )
        kind, data = content[at + 6], content[at + _FRAGMENT_HEADER : at + _FRAGMENT_HEADER + length]
        if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST) or zlib.crc32(content[at + 6 : at + 7] + data) != checksum:
            at, is_inside = at + room, False  # as W&B does: on with the next block
            continue
        at += _FRAGMENT_HEADER + length
        if kind in (_WHOLE, _FIRST):
            parts, is_inside = [], True
        parts.append(data)
        if kind in (_WHOLE, _LAST) and is_inside:
            yield b"".join(parts)
            is_inside = False


def _step(record: bytes) -> int | None:
    """The step of a record of W&B; None where it is of something else."""
    found = _parsed(record)
    if found.WhichOneof("record_type") != "history":
        return None
    if found.history.HasField("step"):
        return int(found.history.step.num)
    named = [item for item in found.history.item if "_step" in (item.key, *item.nested_key)]
    return int(json.loads(named[0].value_json)) if named else None


def _parsed(record: bytes) -> Any:
    """A record of W&B as its own library reads it."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # of which mypy sees nothing
    return messages.Record.FromString(record)
