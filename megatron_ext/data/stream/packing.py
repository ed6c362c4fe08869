"""Best-fit packing: samples of whole documents, where reading one after the other would cut most long ones.

A document longer than a sample fills whole samples, and its rest is packed as the others are: longest first, each into
the fullest pack that has room for it (Ding et al. 2024, Fewer Truncations Improve Language Modeling, arXiv 2404.10830).
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.data.dataset import PREPARE_AGAIN
from megatron_ext.data.indexed import read_index
from megatron_ext.errors import DataError

_BLOCK = 1 << 20
"""Documents that are packed with each other; a few seconds each."""


@dataclass(frozen=True)
class Packs:
    """Pieces of documents, in packs of at most `size` tokens."""

    size: int
    starts: np.ndarray[Any, Any]
    """Number of the first token of each piece in the file; those of a pack stand together."""
    lengths: np.ndarray[Any, Any]
    bounds: np.ndarray[Any, Any]
    """The first piece of each pack, and behind the last one the number of pieces."""
    cut: int
    """Documents in more than one pack."""
    cut_otherwise: int
    """Documents in more than one sample where they are read one after the other."""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def padding(self) -> float:
        """The share of all tokens of packs that is filled up."""
        return 1 - float(self.lengths.sum(dtype=np.int64)) / (len(self) * self.size)

    def pieces(self, pack: int) -> list[tuple[int, int]]:
        """First token and length of each piece of a pack."""
        here = slice(int(self.bounds[pack]), int(self.bounds[pack + 1]))
        return list(zip(self.starts[here].tolist(), self.lengths[here].tolist(), strict=True))

    def filled(self, what: str = "samples") -> str:
        """How full the packs are of samples that are never cut, for people."""
        return (
            f"{len(self.lengths):,} {what} packed into {len(self):,} of {self.size:,} tokens, filled to "
            f"{1 - self.padding:.2%}"
        )

    def saved(self) -> str:
        """What packing saves, for people."""
        return (
            f"packed into {len(self):,} samples of {self.size:,}: documents cut {self.cut:,} instead of "
            f"{self.cut_otherwise:,}, filled up {self.padding:.3%}"
        )


@lru_cache(maxsize=64)
def packs_of(prefix: str, size: int, together: int = 1) -> Packs:
    """The packs of the dataset at `prefix`, which follow from the lengths of its documents alone.

    Args:
        together: so many documents, one behind the other in the file, are one piece.

    Raises:
        DataError: it has no index, or one that is damaged.
    """
    return best_fit(lengths_together(prefix, together), size)


def lengths_together(prefix: str, together: int) -> np.ndarray[Any, Any]:
    """Tokens of each `together` documents of the dataset at `prefix`.

    Raises:
        DataError: it has no index, or one that is damaged.
    """
    lengths = np.asarray(read_index(Path(f"{prefix}.idx"))[1])
    if len(lengths) % together:
        raise DataError(f"{prefix}: of its {len(lengths)} samples each {together} belong together; {PREPARE_AGAIN}")
    return lengths if together == 1 else lengths.reshape(-1, together).sum(axis=1, dtype=lengths.dtype)


def best_fit(lengths: np.ndarray[Any, Any], size: int) -> Packs:
    """Pack documents of these lengths, which stand one after the other in a file."""
    first, piece_lengths, packs = _pieces(lengths, size)
    number = np.empty(len(first), dtype=np.int64)
    done = 0
    for begin in range(0, len(first), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        number[block], done = _packed(piece_lengths[block], size, done)
    order = np.lexsort((first, number))
    bounds = np.searchsorted(number[order], np.arange(done + 1))
    return Packs(size, first[order], piece_lengths[order], bounds, packs, cut_in_samples(lengths, size))


def cut_in_samples(lengths: np.ndarray[Any, Any], size: int) -> int:
    """How many documents stand in more than one sample where they follow each other without a gap."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return int(np.count_nonzero((ends - lengths) // size != (ends - 1) // size))


def _pieces(lengths: np.ndarray[Any, Any], size: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], int]:
    """First token and length of what is packed: documents, or their parts; and how many documents have parts."""
    lengths = lengths.astype(np.int64)
    parts = np.maximum(-(-lengths // size), 1)
    document = np.repeat(np.arange(len(lengths)), parts)
    part = np.arange(len(document)) - (np.cumsum(parts) - parts)[document]
    begins = (np.cumsum(lengths) - lengths)[document] + part * size
    return begins, np.minimum(lengths[document] - part * size, size), int(np.count_nonzero(parts > 1))


def _packed(lengths: np.ndarray[Any, Any], size: int, first: int) -> tuple[np.ndarray[Any, Any], int]:
    """The pack of each piece, counted from `first`, and the number of the one behind the last."""
    found = np.empty(len(lengths), dtype=np.int64)
    open_packs: list[list[int]] = [[] for _ in range(size + 1)]
    room = 0  # bit n: there is a pack with room for exactly n tokens
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = room >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            pack = open_packs[left].pop()
            if not open_packs[left]:
                room &= ~(1 << left)
        else:
            left, pack, first = size, first, first + 1
        found[piece] = pack
        if left > length:
            open_packs[left - length].append(pack)
            room |= 1 << (left - length)
    return found, first
