"""Filters of documents: what they are, the few that are built in, and how `module:Class` becomes one.

A filter is made once in each worker, without arguments, and called with every text. It returns the text, which it may
have changed, or None, or `Dropped` with a reason, to leave the document out:

    class LongEnough:
        def __call__(self, text: str) -> str | Dropped | None:
            return text if len(text) > 100 else Dropped("short")

Libraries have the rest: examples/filters has one for HojiChar and one for datatrove.
"""

import hashlib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_ext.data.prepare.segment_table import SegmentHash
from megatron_ext.errors import DataError

_WINDOW = 16
"""Characters of the pieces of text that count as repeated."""
_MULTIPLIER = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Dropped:
    """A document is left out, for a reason that is counted."""

    reason: str


class Filter(Protocol):
    """See the head of this file."""

    def __call__(self, text: str) -> str | Dropped | None:
        """The text that is kept, or why there is none."""


class Length:
    """Leaves out documents of fewer or more characters."""

    def __init__(self, fewest: int, most: int | None) -> None:
        self._fewest, self._most = fewest, most

    def __call__(self, text: str) -> str | Dropped:
        if len(text) < self._fewest:
            return Dropped("too short")
        return Dropped("too long") if self._most is not None and len(text) > self._most else text


class Repetition:
    """Leaves out documents in which more than a share of all runs of 16 characters stands there before."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._hash = SegmentHash(_MULTIPLIER)

    def __call__(self, text: str) -> str | Dropped:
        return Dropped("repetition") if self.share(text) > self._most else text

    def share(self, text: str) -> float:
        """Runs of 16 characters that stood in `text` before, by all such runs."""
        if len(text) <= _WINDOW:
            return 0.0
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        runs = self._hash.of_windows(codes, _WINDOW)
        return 1 - len(np.unique(runs)) / len(runs)


class Chain:
    """Filters one after the other; a text that one drops reaches no later one."""

    def __init__(self, filters: Sequence[tuple[str, Filter]]) -> None:
        self._filters = filters

    def __call__(self, text: str) -> str | Dropped:
        """The text that is left, or why it was dropped.

        Raises:
            DataError: a filter failed.
        """
        for name, keep in self._filters:
            try:
                result = keep(text)
            except Exception as error:
                raise DataError(f"filters: {name} failed on {text[:60]!r}: {type(error).__name__}: {error}") from error
            if result is None:
                return Dropped(name)
            if isinstance(result, Dropped):
                return result
            if not isinstance(result, str):
                raise DataError(f"filters: {name} returned {type(result).__name__}; expected a text, None or Dropped")
            if result is not text and not _is_utf8(result):
                raise DataError(f"filters: {name} returned half a character, which UTF-8 has not, for {text[:60]!r}")
            text = result
        return text


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def chain_of(names: Sequence[str], fewest: int, most: int | None, repetition: float | None) -> Chain:
    """The filters of a command; what costs least comes first."""
    filters: list[tuple[str, Filter]] = []
    if fewest > 0 or most is not None:
        filters.append(("length", Length(fewest, most)))
    if repetition is not None:
        filters.append(("repetition", Repetition(repetition)))
    return Chain(filters + [(name, _made(name)) for name in names])


def fingerprint_of(name: str) -> str:
    """Changes when the file of the class `module:Class` does.

    Raises:
        DataError: there is no such class.
    """
    _made(name)
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else ""


def _made(name: str) -> Any:
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except ModuleNotFoundError as error:
        is_theirs = error.name is not None and not module.startswith(error.name)
        way_out = f"pip install {error.name}" if is_theirs else "give module:Class, the module as Python imports it"
        raise DataError(f"filters: {name}: no module {error.name!r}; {way_out}") from error
    except Exception as error:
        raise DataError(f"filters: {name}: {type(error).__name__}: {error}; expected module:Class") from error
    if not callable(made):
        raise DataError(f"filters: {name}: an object of it cannot be called with a text")
    return made
