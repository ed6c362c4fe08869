"""Joins the parts of a preparation to token files, in the order of the text or in a random one, in bounded memory.

The random order is that of hashes of text and place, found in two passes: each part is sorted when it is written, in
runs that fit into memory, and what a stretch of the hashes has in all runs is put together here, stretch by stretch.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.data.indexed import sync, write_index
from megatron_ext.data.prepare.parts import DOCUMENT, Part, gathered
from megatron_ext.manifest import FileSum

FILE_SHIFT = 44
"""Where the number of its file stands in a document's place."""
MOST_FILES = 1 << (64 - FILE_SHIFT)
_COMPARED = 1 << 22
"""Documents whose hashes are compared at once."""


@dataclass(frozen=True)
class _Stretch:
    """Some documents of a run that follow each other."""

    part: Part
    first: int
    last: int
    first_token: int
    last_token: int


def check_parts(parts: Sequence[Part]) -> None:
    """Raise DataError where a part was damaged after it was written."""
    for part in parts:
        if not part.is_done():
            raise part.damaged()


def find_copies(parts: Sequence[Part], split: str) -> int:
    """Mark in files beside the parts all but the first of documents that have the same text; how many they are."""
    copies = [np.zeros(len(_records(part, split)), dtype=bool) for part in parts]
    ranges = max(1, sum(map(len, copies)) // _COMPARED)
    for number in range(ranges):
        low, high = (np.uint64((number + more) * (2**64 - 1) // ranges) for more in (0, 1))
        found, whose, where = [], [], []
        for owner, part in enumerate(parts):
            records = _records(part, split)
            hashes = records["high"]
            within = np.flatnonzero((hashes >= low) & ((hashes < high) | (number == ranges - 1)))
            found.append(np.asarray(records[within]))
            whose.append(np.full(len(within), owner))
            where.append(within)
        records, owners, places = (np.concatenate(column) for column in (found, whose, where))
        order = np.lexsort((records["place"], records["low"], records["high"]))
        records, owners, places = records[order], owners[order], places[order]
        alike = [records[half][1:] == records[half][:-1] for half in ("low", "high")]
        again = np.flatnonzero(alike[0] & alike[1])
        for owner, place in zip(owners[again + 1].tolist(), places[again + 1].tolist(), strict=True):
            copies[owner][place] = True
    for part, marks in zip(parts, copies, strict=True):
        part.copies(split).write_bytes(marks.tobytes())
    return int(sum(marks.sum() for marks in copies))


def join_split(
    parts: Sequence[Part], split: str, output: Path, dtype: np.dtype[np.generic], *, buckets: int, counts: np.ndarray
) -> FileSum:
    """Write `split`.bin and .idx to `output`, and return the sum of the first; neither where there is no document.

    Args:
        buckets: stretches of hashes of the random order; 0 keeps the order of the text.
        counts: documents, tokens and bytes of each file of the corpus are added to it, int64 [files, 3].
    """
    target, lengths_file = output / f"{split}.bin", output / f"{split}.lengths"
    size = crc = 0
    with open(target, "wb") as tokens, open(lengths_file, "wb") as lengths:
        for stretches in _in_random_order(parts, split, buckets) if buckets else _in_order(parts, split):
            for ids, records in _documents(stretches, split, dtype, in_order=buckets > 0):
                data = ids.tobytes()
                tokens.write(data)
                size, crc = size + len(data), zlib.crc32(data, crc)
                if records is not None:
                    lengths.write(records["tokens"].tobytes())
                    files = (records["place"] >> np.uint64(FILE_SHIFT)).astype(np.int64)
                    np.add.at(counts[:, 0], files, 1)
                    np.add.at(counts[:, 1], files, records["tokens"])
                    np.add.at(counts[:, 2], files, records["bytes"])
        sync(tokens)
    if size:
        write_index(output / f"{split}.idx", np.memmap(lengths_file, dtype=np.int64, mode="r"), dtype)
    else:
        target.unlink()
    lengths_file.unlink()
    return FileSum(size, crc)


def _records(part: Part, split: str) -> np.ndarray:
    path = part.documents(split)
    return np.memmap(path, dtype=DOCUMENT, mode="r") if path.stat().st_size else np.empty(0, dtype=DOCUMENT)


def _in_order(parts: Sequence[Part], split: str) -> Iterator[list[_Stretch]]:
    for part in parts:
        records = _records(part, split)
        first = token = 0
        for count in part.runs(split):
            tokens = int(records["tokens"][first : first + count].sum())
            yield [_Stretch(part, first, first + count, token, token + tokens)]
            first, token = first + count, token + tokens


def _in_random_order(parts: Sequence[Part], split: str, buckets: int) -> Iterator[list[_Stretch]]:
    edges = np.array([number * 2**64 // buckets for number in range(1, buckets)], dtype=np.uint64)
    runs = []
    for part in parts:
        records = _records(part, split)
        first = token = 0
        for count in part.runs(split):
            run = records[first : first + count]
            bounds = np.concatenate(([0], np.searchsorted(run["order"], edges), [count]))
            tokens = np.concatenate(([0], np.cumsum(run["tokens"])))[bounds] + token
            runs.append((part, bounds + first, tokens))
            first, token = first + count, int(tokens[-1])
    for number in range(buckets):
        yield [
            _Stretch(part, *(int(x) for x in (*bounds[number : number + 2], *tokens[number : number + 2])))
            for part, bounds, tokens in runs
            if bounds[number] < bounds[number + 1]
        ]


def _documents(
    stretches: Sequence[_Stretch], split: str, dtype: np.dtype[np.generic], *, in_order: bool
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Token ids of the documents that stay, in blocks; with the first block the records of all."""
    if not stretches:
        return
    loaded = [
        np.fromfile(s.part.tokens(split), dtype, s.last_token - s.first_token, offset=s.first_token * dtype.itemsize)
        for s in stretches
    ]
    ids = np.concatenate(loaded)
    del loaded
    records = np.concatenate([_records(s.part, split)[s.first : s.last] for s in stretches])
    starts = np.cumsum(records["tokens"]) - records["tokens"]
    stay = ~np.concatenate([s.part.are_copies(split, s.first, s.last) for s in stretches])
    records, starts = records[stay], starts[stay]
    if in_order:
        order = np.argsort(records["order"], kind="stable")
        records, starts = records[order], starts[order]
    told: np.ndarray | None = records
    for block in gathered(ids, starts, records["tokens"]):
        yield block, told
        told = None
