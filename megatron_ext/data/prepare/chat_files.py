"""From the records that workers write to the files of prepared chat data.

A record is one document of the parts' token files, so that the same code writes, joins, sorts and resumes them as text:
a number that describes it, and then the ids of its samples, those that count as labels with their sign turned.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_ext.data.indexed import read_index, sync, token_dtype, write_index
from megatron_ext.data.prepare.chat_samples import ChatSample
from megatron_ext.data.supervised import mask_file, weights_file

RECORD = np.dtype(np.int32)
_BLOCK = 1 << 20
"""Tokens of records that are taken apart at once."""


@dataclass
class SplitCounts:
    """What was written of a split."""

    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    has_weights: bool = False
    ends: Counter[int] = field(default_factory=Counter)
    """Tokens that answers end with."""


def chat_record(sample: ChatSample) -> np.ndarray[Any, Any]:
    """One sample behind its weight."""
    weight = np.array([sample.weight], dtype=np.float32).view(RECORD)
    return np.concatenate([weight, np.array(sample.signed, dtype=RECORD)])


def pair_record(chosen: ChatSample, rejected: ChatSample) -> np.ndarray[Any, Any]:
    """Two samples behind the length of the first."""
    return np.array([len(chosen.ids), *chosen.signed, *rejected.signed], dtype=RECORD)


def unpack_split(directory: Path, split: str, vocab_size: int, *, pairs: bool) -> SplitCounts:
    """Turn the joined records of `split` into the files that are read."""
    prefix, dtype = directory / split, token_dtype(vocab_size)
    _, lengths = read_index(Path(f"{prefix}.idx"))
    records = np.memmap(f"{prefix}.bin", RECORD, "r")
    counts, found = SplitCounts(), list[np.ndarray[Any, Any]]()
    files = {name: directory / f"{split}.{name}.new" for name in ("bin", "mask", "weights")}
    with ExitStack() as stack:
        opened = {name: stack.enter_context(open(path, "wb")) for name, path in files.items()}
        bits = _Bits(opened["mask"])
        for start, part in _blocks(lengths):
            block = np.asarray(records[start : start + int(part.sum(dtype=np.int64))])
            described, samples = _samples(block, part, pairs=pairs)
            if not pairs:
                weights = described.view(np.float32)
                counts.has_weights |= bool((weights != 1).any())
                opened["weights"].write(weights.tobytes())
            signed = np.delete(block, np.cumsum(part) - part)
            mask = signed < 0
            ids = np.where(mask, ~signed, signed)
            opened["bin"].write(ids.astype(dtype).tobytes())
            bits.write(mask)
            _count(counts, ids, mask, samples)
            found.append(samples)
        bits.end()
        for file in opened.values():
            sync(file)
    if not counts.has_weights:
        files.pop("weights").unlink()
    for name, path in files.items():
        path.replace({"bin": Path(f"{prefix}.bin"), "mask": mask_file(prefix), "weights": weights_file(prefix)}[name])
    write_index(Path(f"{prefix}.idx"), np.concatenate(found), dtype)
    return counts


def _samples(
    block: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], *, pairs: bool
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """What describes each record, and the length of each sample in them."""
    described = block[np.cumsum(lengths, dtype=np.int64) - lengths]
    if not pairs:
        return described, lengths - 1
    return described, np.stack([described, lengths - 1 - described], axis=1).reshape(-1)


def _count(
    counts: SplitCounts, ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], samples: np.ndarray[Any, Any]
) -> None:
    counts.samples += len(samples)
    counts.tokens += len(ids)
    counts.supervised += int(mask.sum())
    counts.longest = max(counts.longest, int(samples.max()))
    last = np.zeros(len(ids), dtype=bool)
    last[np.cumsum(samples) - 1] = True
    ends = mask & (last | ~np.append(mask[1:], False))
    for number, times in zip(*np.unique(ids[ends], return_counts=True), strict=True):
        counts.ends[int(number)] += int(times)


def _blocks(lengths: np.ndarray[Any, Any]) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """The number of the first token of a stretch of records, and their lengths."""
    behind = np.cumsum(lengths, dtype=np.int64)
    first = 0
    while first < len(lengths):
        start = int(behind[first] - lengths[first])
        last = max(first + 1, int(np.searchsorted(behind, start + _BLOCK, side="right")))
        yield start, np.asarray(lengths[first:last])
        first = last


class _Bits:
    """Writes bits to a file, eight to a byte, the first lowest, in stretches of any length."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._left = file, np.empty(0, dtype=bool)

    def write(self, bits: np.ndarray[Any, Any]) -> None:
        """Write some, but for the last that fill no byte."""
        bits = np.concatenate([self._left, bits])
        whole = len(bits) // 8 * 8
        self._file.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._left = bits[whole:]

    def end(self) -> None:
        """Write those that are left."""
        self._file.write(np.packbits(self._left, bitorder="little").tobytes())
