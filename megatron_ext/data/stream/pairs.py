"""Packed pairs of answers: whole pairs by best fit, each answer with its own copy of the prompt."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.data.dataset import PREPARE_AGAIN
from megatron_ext.data.stream.packing import Packs
from megatron_ext.data.stream.plan import Place
from megatron_ext.data.stream.units import TokenFile
from megatron_ext.data.supervised import Supervised
from megatron_ext.errors import DataError


class PackedPairs(TokenFile):
    """Prepared pairs, read by packs: their number is that of the unit.

    A pair is never in two packs, so that both of its answers are in one micro-batch. What no pair fills is filled with
    tokens of the first one again, of no answer.

    Args:
        first: the number of its first pair among all that the run reads.
    """

    def __init__(self, prefix: str | Path, packs: Packs, first: int) -> None:
        data = Supervised(prefix)
        super().__init__(prefix, data.num_tokens)
        self._data, self._packs, self._first = data, packs, first

    def pack(self, place: Place) -> dict[str, Any]:
        """Tokens, labels, which of these count, lengths of the answers with their prompts, and which token is whose."""
        tokens = np.empty(place.length, dtype=np.int64)
        labels, mask = np.zeros_like(tokens), np.zeros(place.length, dtype=np.float32)
        segments = np.full_like(tokens, -1)
        pairs, lengths, counted = self._numbers(place), list[int](), list[int]()
        end = 0
        for segment, sample in enumerate(2 * pair + answer for pair in pairs for answer in (0, 1)):
            ids, counts, _ = self._data.sample(sample)
            begin, end = end, end + len(ids)
            tokens[begin:end], segments[begin:end] = ids, segment
            # The label of a token is the one behind it; the last of an answer has none.
            labels[begin : end - 1], mask[begin : end - 1] = ids[1:], counts[1:]
            lengths.append(len(ids))
            counted.append(int(counts[1:].sum()))
        if min(counted) == 0:
            raise DataError(f"{self.where(place)}: an answer has no token to compare; {PREPARE_AGAIN}")
        if room := place.length - end:
            tokens[end:] = np.resize(tokens[: lengths[0]], room)
            lengths.append(room)
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": mask,
            "documents": lengths,
            "segments": segments,
            "answer_tokens": np.array(counted).reshape(-1, 2),
            "pairs": self._first + np.array(pairs),
        }

    def where(self, place: Place) -> str:
        """See `TokenFile.where`."""
        return f"pairs {', '.join(f'{number:,}' for number in self._numbers(place))} of {self._data.prefix}"

    def _numbers(self, place: Place) -> list[int]:
        return [self._data.number_at(start) // 2 for start, _ in self._packs.pieces(place.unit)]


def first_pairs(sizes: Mapping[str, int], prefixes: Iterable[str]) -> dict[str, int]:
    """The number of the first pair of each of `prefixes`, in this order, among all that a run reads.

    Args:
        sizes: pairs of each.
    """
    firsts, end = dict[str, int](), 0
    for prefix in dict.fromkeys(prefixes):
        firsts[prefix], end = end, end + sizes[prefix]
    return firsts
