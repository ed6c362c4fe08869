"""Encodes documents by the compiled best paths through the pieces of a unigram model, whether or not text repeats.

Legend of array shapes: C characters, D documents, B breaks.
"""

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from megatron_ext.data.indexed import token_dtype
from megatron_ext.data.prepare.compiled_paths import Breaks, CompiledPaths  # needs numba
from megatron_ext.data.prepare.running_scores import SPACES
from megatron_ext.data.prepare.segment_reading import END, Notice, SegmentReader, codes_of
from megatron_ext.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megatron_ext.data.prepare.encoder import Encoder

_WINDOW = 1 << 16
"""Characters that are read at once: their arrays stay in the processor's cache."""


@cache
def load() -> None:
    """Load the compiled code, which takes some tenths of a second."""
    nothing = np.empty(0, dtype=np.int64)
    paths = CompiledPaths([("a", 0.0)], np.zeros(256, dtype=np.int64), nothing)
    paths.read(codes_of("a"), Breaks(*[nothing] * 3), 1, 0.0)


class PathEncoder:
    """See the head of this file, and `Encoder`.

    Args:
        reader: of a tokenizer whose ids follow from sums of scores (`SegmentReader.paths`).
        others: makes what encodes texts that have `Paths.apart`.
    """

    def __init__(
        self, tokenizer: Tokenizer, reader: SegmentReader, notice: Notice, others: "Callable[[], Encoder]"
    ) -> None:
        assert reader.paths is not None
        self._reader, self._notice, self._eod = reader, notice, tokenizer.eod
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._paths = CompiledPaths(reader.paths.vocabulary, reader.paths.byte_ids, reader.paths.hidden)
        self._longest = max(map(len, reader.cut_out), default=1)
        self._apart, self._make_others = reader.paths.apart, others

    @cached_property
    def _others(self) -> "Encoder":
        return self._make_others()

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """See `Encoder`."""
        ids = [np.empty(0, dtype=self._dtype)]
        for stands_apart, some in groupby(texts, self._stands_apart):
            encode = self._others.encode if stands_apart else self._ids_of
            ids.append(encode(list(some)))
        return np.concatenate(ids)

    def why_not(self, text: str) -> str | None:
        """See `Encoder`."""
        return self._others.why_not(text) if self._stands_apart(text) else None

    def _stands_apart(self, text: str) -> bool:
        if not self._apart:
            return False
        marked = text.replace(*SPACES)
        return any(piece in marked for piece in self._apart)

    def _ids_of(self, texts: Sequence[str]) -> np.ndarray:
        self._notice(texts)
        text, ids = "".join(text + END for text in texts), [np.empty(0, dtype=self._dtype)]
        ends_D = np.cumsum([len(text) + 1 for text in texts]) - 1
        at, size, total = 0, _WINDOW, 0.0
        while at < len(text):
            window = text[at : at + size]
            is_last = at + size >= len(text)
            limit = len(window) - (0 if is_last else self._longest)
            codes_C = codes_of(window)
            breaks = self._breaks(window, codes_C, ends_D - at, limit)
            read, stop, total = self._paths.read(codes_C, breaks, limit, total)
            ids.append(read.astype(self._dtype))
            at, size = at + stop, _WINDOW if stop else 2 * size
        return np.concatenate(ids)

    def _breaks(self, text: str, codes_C: np.ndarray, ends_D: np.ndarray, limit: int) -> Breaks:
        """Ends of documents, and tokens that are cut out, as far as it is sure that they are no longer ones."""
        ends_D = ends_D[(ends_D >= 0) & (ends_D < len(text))]
        starts, stops, found = self._reader.places(text, codes_C)
        starts_B, stops_B = np.concatenate([ends_D, starts]), np.concatenate([ends_D + 1, stops])
        ids_B = np.concatenate([np.full(len(ends_D), self._eod), found])
        order = np.argsort(starts_B, kind="stable")
        order = order[: np.searchsorted(starts_B[order], limit, side="right")]
        return Breaks(starts_B[order], stops_B[order], ids_B[order])
