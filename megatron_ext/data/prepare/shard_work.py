"""What a worker of a preparation does with one shard: read, filter, encode, assign to splits, write a part."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_ext.data.prepare.corpus import Shard
from megatron_ext.data.prepare.documents import read_shard, where_in
from megatron_ext.data.prepare.encoder import encoder_for
from megatron_ext.data.prepare.faults import GOING_ON, Faults
from megatron_ext.data.prepare.filters import Dropped, chain_of
from megatron_ext.data.prepare.join import FILE_SHIFT
from megatron_ext.data.prepare.parts import DOCUMENT, Part, Told
from megatron_ext.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
_BATCH_CHARACTERS = 1 << 18
_MUCH = 1 << 19
"""Bytes of files that are worth loading compiled code."""
_SAMPLES, _SAMPLE_CHARACTERS = 5, 500
"""Documents that are kept of each reason to leave some out, and characters of each."""
_ORDER = 0x6D65676174726F6E
"""Makes the random order another number than the hash that splits follow from."""


@dataclass(frozen=True)
class TextOptions:
    """Which documents are taken and in which order they are written; all that the result depends on beside the text.

    Attributes:
        split: shares of train, validation and test, which add to 1.
        filters: classes, as `module:Class`.
        max_repetition: largest share of a text's runs of 16 characters that it has twice.
        deduplicate: keep one of documents with the same text.
        order: of the documents in the output: random, or that of the text.
        bad_lines: whether a line that cannot be read ends the command, or is counted and left out.
    """

    text_key: str = "text"
    split: tuple[float, ...] = (0.98, 0.01, 0.01)
    filters: tuple[str, ...] = field(default=())
    min_characters: int = 0
    max_characters: int | None = None
    max_repetition: float | None = None
    deduplicate: bool = False
    order: Literal["random", "file"] = "random"
    bad_lines: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True)
class Task:
    """A shard to be done.

    Attributes:
        file: number of its file.
        number: its number in that file.
        state: bytes of the file, and when it was changed last.
    """

    file: int
    number: int
    shard: Shard
    state: tuple[int, int]

    def part(self, work: Path) -> Part:
        """What is made of it, in `work`; believed only for the file as it is."""
        shard = self.shard
        made_of: list[str | int] = [str(shard.path.resolve()), *self.state, shard.start, shard.stop, shard.group]
        return Part(work, f"part-{self.file:06d}-{self.number:06d}", made_of)


class ShardWorker:
    """Does shards, one after the other, in one process."""

    def __init__(self, work: Path, options: TextOptions, tokenizer: Tokenizer) -> None:
        self._work, self._options, self._tokenizer = work, options, tokenizer
        self._read = 0
        self._is_much: bool | None = None
        o = options
        self._keep = chain_of(o.filters, o.min_characters, o.max_characters, o.max_repetition)

    def do(self, task: Task) -> None:
        """Write the part of a shard."""
        self._read += task.shard.stop - task.shard.start
        if self._is_much != (is_much := self._read > _MUCH):
            notice = partial(_say_spelt, self._tokenizer, self._work / "spelt")
            self._is_much, self._encoder = is_much, encoder_for(self._tokenizer, notice, is_much=is_much)
        told = Told()
        batches = self._batches(task, told)
        task.part(self._work).write(batches, SPLITS, told, in_order=self._options.order == "random")

    def _batches(self, task: Task, told: Told) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        texts = self._texts(task, told)
        while batch := _batch(texts):
            ids = self._encoder.encode([text for _, text in batch])
            ends = np.flatnonzero(ids == self._tokenizer.eod)
            assert len(ends) == len(batch), "the token that ends documents is in no text"
            records, hashes = self._records(batch, task.file)
            records["tokens"] = np.diff(ends, prepend=-1)
            yield ids, splits_of(hashes, self._options.split), records

    def _texts(self, task: Task, told: Told) -> Iterator[tuple[int, str]]:
        faults = Faults(are_fatal=self._options.bad_lines == "stop", advice=GOING_ON)
        for place, text in read_shard(task.shard, self._options.text_key, faults):
            kept = self._keep(text) if text else text
            if isinstance(kept, Dropped):
                told.dropped[kept.reason] = seen = told.dropped.get(kept.reason, 0) + 1
                if seen <= _SAMPLES:
                    told.samples.append((kept.reason, str(task.shard.path), text[:_SAMPLE_CHARACTERS]))
            elif kept and (why := self._encoder.why_not(kept)) is not None:
                faults.meet(partial(where_in, task.shard.path, place), why)
            elif kept:
                yield place, kept
            else:
                told.empty += 1
        told.bad, told.bad_lines = faults.count, faults.messages

    def _records(self, batch: Sequence[tuple[int, str]], file: int) -> tuple[np.ndarray, np.ndarray]:
        """Records of documents, and hashes of their texts, uint64 [D]."""
        records = np.zeros(len(batch), dtype=DOCUMENT)
        encoded = [text.encode() for _, text in batch]
        hashes = np.array([hash_of(data, 8)[0] for data in encoded], dtype=np.uint64)
        places = np.array([place for place, _ in batch], dtype=np.uint64) | np.uint64(file << FILE_SHIFT)
        records["place"], records["bytes"] = places, [len(data) for data in encoded]
        # Copies of a text are no neighbours: its place counts too.
        records["order"] = mixed(hashes ^ mixed(places ^ np.uint64(_ORDER)))
        if self._options.deduplicate:
            both = np.array([hash_of(data, 16) for data in encoded], dtype=np.uint64)
            records["high"], records["low"] = both[:, 0], both[:, 1]
        return records, hashes


def _batch(texts: Iterator[tuple[int, str]]) -> list[tuple[int, str]]:
    """The next texts, about as many as are encoded at once."""
    batch: list[tuple[int, str]] = []
    size = 0
    while size < _BATCH_CHARACTERS and (one := next(texts, None)) is not None:
        batch.append(one)
        size += len(one[1])
    return batch


def hash_of(data: bytes, size: int) -> list[int]:
    """The BLAKE2b hash of `size` bytes, as numbers of 64 bits."""
    digest = hashlib.blake2b(data, digest_size=size).digest()
    return [int.from_bytes(digest[at : at + 8], "little") for at in range(0, size, 8)]


def mixed(numbers: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, a permutation of 64 bits."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: np.ndarray = numbers ^ (numbers >> np.uint64(31))
    return result


def splits_of(hashes: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """Number of the split of each document, by its hash alone: it stays there whatever else the corpus has."""
    draws = hashes.astype(np.float64) / 2**64
    last = max(number for number, share in enumerate(shares) if share > 0)
    split_of = np.full(len(draws), -1)
    for number, share in zip(count(), shares):
        split_of[(split_of < 0) & (draws < share)] = number
        draws = draws - share
    return np.where(split_of < 0, last, split_of)


def _say_spelt(tokenizer: Tokenizer, said: Path, texts: Sequence[str]) -> None:
    """Say once that a text spells out a special token, in whichever process meets it first."""
    if said.exists():
        return
    for text in texts:
        if mark := tokenizer.spells(text):
            said.touch()
            log.warning(
                "a document spells out the special token %r: in documents that is text, not the token itself. "
                "Conversations need them as tokens (prepare their messages with --chat); plain text does not",
                mark,
            )
            return
