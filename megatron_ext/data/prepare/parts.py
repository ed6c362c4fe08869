"""The parts of a data preparation that can be interrupted: each is there as a whole, or not believed."""

import json
import zlib
from array import array
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from megatron_ext.data.indexed import sync, write_synced
from megatron_ext.errors import DataError
from megatron_ext.manifest import FileSum, file_sum, joined

_BLOCK = 1 << 24


class Part:
    """Token ids and document lengths of one shard, a file of each for every split, and a marker with their sums.

    The marker is written last and makes the part done. Its sums find what was damaged later, or never reached the disk.
    """

    def __init__(self, work: Path, number: int) -> None:
        self._stem = f"part-{number:06d}"
        self._work = work
        self._marker = work / f"{self._stem}.done"

    def tokens(self, split: str) -> Path:
        """Token ids of the documents of `split`, end to end."""
        return self._work / f"{self._stem}-{split}.bin"

    def lengths(self, split: str) -> Path:
        """Tokens of each document of `split`, int64."""
        return self._work / f"{self._stem}-{split}.len"

    def write(self, documents: Iterable[tuple[str, np.ndarray]], splits: Sequence[str]) -> None:
        """Write the part from (split, token ids) of its documents."""
        lengths = {split: array("q") for split in splits}
        with ExitStack() as stack:
            files = {split: stack.enter_context(open(self.tokens(split), "wb")) for split in splits}
            for split, ids in documents:
                files[split].write(ids.tobytes())
                lengths[split].append(len(ids))
        for split in splits:
            self.lengths(split).write_bytes(lengths[split].tobytes())
        paths = [path for split in splits for path in (self.tokens(split), self.lengths(split))]
        sums = {path.name: (found.bytes, found.crc32) for path in paths for found in [file_sum(path)]}
        write_synced(self._marker, json.dumps(sums).encode())

    def is_done(self) -> bool:
        """Whether it was written as a whole and nothing of it has changed since; reads it."""
        try:
            sums = self.sums()
            return bool(sums) and all(file_sum(self._work / name) == expected for name, expected in sums.items())
        except OSError:
            return False

    def sums(self) -> dict[str, FileSum]:
        """What its marker says of its files; empty where it says nothing."""
        try:
            content = json.loads(self._marker.read_bytes())
            return {str(name): FileSum(int(size), int(crc)) for name, (size, crc) in content.items()}
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            return {}

    def damaged(self) -> DataError:
        """Take back that it is done; the error to raise."""
        self._marker.unlink(missing_ok=True)
        advice = "start the same command again: this part is made anew, the others are kept"
        return DataError(f"{self._work / self._stem}: changed after it was written, by a fault of the disk?; {advice}")


def join_tokens(parts: Sequence[Part], split: str, target: Path) -> FileSum:
    """Join the token ids of `split` end to end into `target`, check them on the way, and return the sum of all.

    Raises:
        DataError: a part was damaged.
    """
    total = FileSum(0, 0)
    with open(target, "wb") as out:
        for part in parts:
            path, size, crc = part.tokens(split), 0, 0
            with open(path, "rb") as file:
                while block := file.read(_BLOCK):
                    out.write(block)
                    size, crc = size + len(block), zlib.crc32(block, crc)
            copied = FileSum(size, crc)
            if copied != part.sums().get(path.name):
                raise part.damaged()
            total = joined(total, copied)
        sync(out)
    return total


def join_lengths(parts: Sequence[Part], split: str) -> np.ndarray:
    """Tokens of every document of `split`, int64. DataError where a part was damaged."""
    result = []
    for part in parts:
        path = part.lengths(split)
        if file_sum(path) != part.sums().get(path.name):
            raise part.damaged()
        result.append(np.fromfile(path, dtype=np.int64))
    return np.concatenate(result) if result else np.empty(0, dtype=np.int64)
