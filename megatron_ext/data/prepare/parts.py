"""The parts of a data preparation that can be interrupted: each is there as a whole, or not believed.

A part is what became of one shard: for each split the token ids of its documents, end to end, and a record of each
document. Documents of a part that has many come in runs, each of which fits into memory and has an order of its own.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_ext.data.indexed import write_synced
from megatron_ext.errors import DataError
from megatron_ext.manifest import FileSum, file_sum

DOCUMENT = np.dtype(
    [
        ("tokens", np.int64),
        ("bytes", np.int64),
        ("place", np.uint64),
        ("order", np.uint64),
        ("high", np.uint64),
        ("low", np.uint64),
    ]
)
"""Of one document: tokens with the end, bytes of UTF-8, where it was read, what it is sorted by, a hash of 128 bits."""
_RUN_BYTES = 1 << 25
_GATHERED = 1 << 20
"""Documents' tokens that are put in order at once."""


@dataclass
class Told:
    """What was met while a part was made.

    Attributes:
        empty: documents without text.
        bad: lines that could not be read.
        bad_lines: the first of them, file, line and reason.
        dropped: documents that filters left out, by reason.
        samples: some of them, (reason, file, beginning of the text).
        read: rows of chat data by what they hold.
    """

    empty: int = 0
    bad: int = 0
    bad_lines: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    samples: list[tuple[str, str, str]] = field(default_factory=list)
    read: dict[str, int] = field(default_factory=dict)


class Part:
    """Token ids and records of the documents of one shard, files of each for every split, and a marker with their sums.

    The marker is written last and makes the part done. Its sums find what was damaged later, or never reached the disk.

    Args:
        made_of: file and place of what it is made of: a part that was made of something else is not done.
    """

    def __init__(self, work: Path, stem: str, made_of: Sequence[str | int]) -> None:
        self._work, self._stem, self._made_of = work, stem, list(made_of)
        self._marker = work / f"{self._stem}.done"

    def tokens(self, split: str) -> Path:
        """Token ids of the documents of `split`, end to end."""
        return self._work / f"{self._stem}-{split}.bin"

    def documents(self, split: str) -> Path:
        """A record of each document of `split`, of type DOCUMENT."""
        return self._work / f"{self._stem}-{split}.docs"

    def copies(self, split: str) -> Path:
        """Which documents of `split` are copies of others, if that was looked for; bool."""
        return self._work / f"{self._stem}-{split}.copies"

    def are_copies(self, split: str, first: int, last: int) -> np.ndarray:
        """Whether each of the documents from `first` to before `last` is a copy."""
        path = self.copies(split)
        if not path.exists():
            return np.zeros(last - first, dtype=bool)
        return np.fromfile(path, dtype=bool, count=last - first, offset=first)

    def write(
        self,
        batches: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
        splits: Sequence[str],
        told: Told,
        *,
        in_order: bool,
    ) -> None:
        """Write the part.

        Args:
            batches: token ids [T], number of the split of each document [D], and records [D].
            told: complete when `batches` end.
            in_order: sort the documents of a run by their `order`.
        """
        runs: dict[str, list[int]] = {split: [] for split in splits}
        with ExitStack() as stack:
            files = {
                split: (
                    stack.enter_context(open(self.tokens(split), "wb")),
                    stack.enter_context(open(self.documents(split), "wb")),
                )
                for split in splits
            }
            held: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
            size = 0
            for batch in batches:
                held.append(batch)
                size += batch[0].nbytes
                if size > _RUN_BYTES:
                    _write_run(held, files, runs, in_order)
                    held, size = [], 0
            _write_run(held, files, runs, in_order)
        paths = [path for split in splits for path in (self.tokens(split), self.documents(split))]
        sums = {path.name: (found.bytes, found.crc32) for path in paths for found in [file_sum(path)]}
        content = {"sums": sums, "runs": runs, "told": asdict(told), "made_of": self._made_of}
        write_synced(self._marker, json.dumps(content).encode())

    def is_done(self) -> bool:
        """Whether it was written as a whole and nothing of it has changed since; reads it."""
        try:
            sums = self._sums() if self._marked().get("made_of") == self._made_of else {}
            return bool(sums) and all(file_sum(self._work / name) == expected for name, expected in sums.items())
        except OSError:
            return False

    def told(self) -> Told:
        """What was met while it was made; DataError where it is damaged."""
        try:
            return Told(**self._marked()["told"])
        except (KeyError, TypeError) as error:
            raise self.damaged() from error

    def runs(self, split: str) -> list[int]:
        """Documents of each run of `split`; DataError where it is damaged."""
        try:
            return [int(count) for count in self._marked()["runs"][split]]
        except (KeyError, TypeError, ValueError) as error:
            raise self.damaged() from error

    def size(self, splits: Sequence[str]) -> np.ndarray:
        """Documents and tokens, int64 [2]."""
        size = np.zeros(2, dtype=np.int64)
        for split in splits:
            records = np.fromfile(self.documents(split), dtype=DOCUMENT)
            size += len(records), records["tokens"].sum()
        return size

    def _sums(self) -> dict[str, FileSum]:
        try:
            return {str(name): FileSum(int(size), int(crc)) for name, (size, crc) in self._marked()["sums"].items()}
        except (KeyError, ValueError, TypeError, AttributeError):
            return {}

    def _marked(self) -> dict[str, Any]:
        try:
            content = json.loads(self._marker.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def damaged(self) -> DataError:
        """Take back that it is done; the error to raise."""
        self._marker.unlink(missing_ok=True)
        advice = "start the same command again: this part is made anew, the others are kept"
        return DataError(f"{self._work / self._stem}: changed after it was written, by a fault of the disk?; {advice}")


def _write_run(
    held: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    files: Mapping[str, tuple[IO[bytes], IO[bytes]]],
    runs: dict[str, list[int]],
    in_order: bool,
) -> None:
    if not held:
        return
    ids, split_of, records = (np.concatenate(column) for column in zip(*held, strict=True))
    starts = np.cumsum(records["tokens"]) - records["tokens"]
    for number, (split, (tokens, documents)) in enumerate(files.items()):
        chosen = np.flatnonzero(split_of == number)
        if in_order:
            chosen = chosen[np.argsort(records["order"][chosen], kind="stable")]
        for block in gathered(ids, starts[chosen], records["tokens"][chosen]):
            tokens.write(block.tobytes())
        documents.write(records[chosen].tobytes())
        runs[split].append(len(chosen))


def gathered(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Iterable[np.ndarray]:
    """The documents that begin at `starts` in `ids`, end to end, in blocks of at most _GATHERED tokens."""
    behind = np.cumsum(lengths)
    first = 0
    while first < len(starts):
        if lengths[first] > _GATHERED:  # as it lies there: places of all its tokens would take eight times its size
            begin, stop = int(starts[first]), int(starts[first] + lengths[first])
            yield from (ids[at : min(at + _GATHERED, stop)] for at in range(begin, stop, _GATHERED))
            first += 1
            continue
        before = behind[first] - lengths[first]
        last = int(np.searchsorted(behind, before + _GATHERED, side="right"))
        some, counts = starts[first:last], lengths[first:last]
        places = np.repeat(some - (np.cumsum(counts) - counts), counts)
        places += np.arange(len(places))
        yield ids[places]
        first = last
