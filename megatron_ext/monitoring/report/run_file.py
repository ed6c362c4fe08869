"""Reads a run's metrics file as far as it has been written, and what is new each time it is asked."""

import os
from pathlib import Path
from typing import Any

from megatron_ext.files import open_regular
from megatron_ext.monitoring.metrics_file import RunHistory, parsed

_MOST_LOADS = 4_000_000
"""Expert loads that are kept, of all layers and reports; of a longer run, of every second report, every fourth."""
_MOST_ROUTED = 4000
_EXPERTS = b', "moe": {'
_AT_ONCE = 1 << 26
_LONGEST = 1 << 24


class RunFile:
    """One run's file. `history` has what was read; of experts only as many reports as a heat map can show.

    A metrics file of 100,000 reports of 70 layers with 128 experts has 6 GB, nearly all of which are loads.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self.history = RunHistory()
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._rest = b""
        """A line that has not ended yet."""
        self._routed: list[dict[str, Any]] = []
        self._stride, self._number = 1, 0

    def update(self) -> bool:
        """Read what is new; whether there was anything. A file that was written anew is read anew.

        Raises:
            OSError: it cannot be read.
        """
        with open_regular(self._path) as file:
            status = os.fstat(file.fileno())
            identity = status.st_dev, status.st_ino
            if self._identity is not None and (identity != self._identity or status.st_size < self._offset):
                self._forget()
            self._identity = identity
            if status.st_size == self._offset:
                return False
            file.seek(self._offset)
            while content := file.read(_AT_ONCE):
                self._offset += len(content)
                *lines, self._rest = (self._rest + content).split(b"\n")
                for line in lines:
                    self._take(line)
                self._rest = self._rest[-_LONGEST:]  # longer than any record: it is none
        return True

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        at = line.find(_EXPERTS)
        if at < 0:
            self.history.add(parsed(line))
            return
        self._number += 1
        if self._number % self._stride:
            # The experts are what is written last; where they are not, the whole line says so.
            record = parsed(line[:at] + b"}") or parsed(line)
            if isinstance(record, dict):
                record.pop("moe", None)
            self.history.add(record)
            return
        record = parsed(line)
        self.history.add(record)
        if isinstance(record, dict) and isinstance(record.get("moe"), dict):
            self._routed.append(record)
            layers = [layer.get("load") for layer in record["moe"].values() if isinstance(layer, dict)]
            loads = sum(len(load) for load in layers if isinstance(load, list))
            if len(self._routed) > min(_MOST_ROUTED, _MOST_LOADS // max(loads, 1)):
                self._halve()

    def _halve(self) -> None:
        """Keep the experts of every second report."""
        for record in self._routed[::2]:
            del record["moe"]
        self._routed, self._stride = self._routed[1::2], 2 * self._stride
