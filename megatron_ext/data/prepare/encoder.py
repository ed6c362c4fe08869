"""Encodes documents by the batch, at several times the speed of the tokenizer's library where its ids allow that.

`SegmentEncoder` cuts text at places that no token can span, and looks the segments between them up in a table of those
that were read before. Natural text repeats itself: of segments of about five bytes, nearly all have been there. Its ids
are the tokenizer's own, whatever the text; `segment_reading` says why. A segment is known by 88 bits of hash: one in
5e20 of those that a full table does not know would be taken for another. Where numba is, `PathEncoder` reads unigram
models without a table, new text as fast as old.

Legend of array shapes: C characters, S segments, D documents.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_ext.data.indexed import token_dtype
from megatron_ext.data.prepare.long_texts import PART, LongTexts
from megatron_ext.data.prepare.running_scores import SPACES, Line
from megatron_ext.data.prepare.segment_reading import END, Notice, SegmentReader, codes_of, segment_reader
from megatron_ext.data.prepare.segment_table import MOST_TOKENS, SegmentHash, SegmentTable, gather
from megatron_ext.data.prepare.space_in_front import without_space_in_front
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.data.tokenizer.probe import HARD_TEXTS

if TYPE_CHECKING:
    from megatron_ext.data.prepare.path_encoder import PathEncoder

_BATCH = 1 << 16
"""Characters that are encoded at once: their arrays stay in the processor's cache."""
_PAIR_BITS = 20
_LONGEST_SEGMENT = 255
"""Characters of the longest segment that is read by itself."""
_MULTIPLIERS = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95


def _deaf(texts: Sequence[str]) -> None:
    """A notice to nobody."""


class Encoder(Protocol):
    """What makes token ids of documents."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids of `texts` (none empty) end to end, each with the end-of-document token after it, in its dtype.

        Raises:
            DataError: see `Tokenizer.encode`.
        """

    def why_not(self, text: str) -> str | None:
        """Why a text is not read in the memory that a process has, or None."""


def encoder_for(tokenizer: Tokenizer, notice: Notice = _deaf, *, is_much: bool = False) -> Encoder:
    """The fastest encoder that gives the ids of `tokenizer`.

    Args:
        notice: told every text, or every part of one that is new, when it is encoded.
        is_much: there is so much text that loading compiled code, some tenths of a second, is worth it.
    """
    make, texts = _faster(tokenizer, is_much), [text for text in HARD_TEXTS if text]
    if make is None or not np.array_equal(make(_deaf).encode(texts), BatchEncoder(tokenizer).encode(texts)):
        return BatchEncoder(tokenizer, notice)
    return make(notice)


def _faster(tokenizer: Tokenizer, is_much: bool) -> Callable[[Notice], Encoder] | None:
    """What makes an encoder that is faster than the library, or gets along with less memory."""
    if (spaced := without_space_in_front(tokenizer)) is not None:
        other, front = spaced
        return lambda notice: SpacedEncoder(encoder_for(other, notice, is_much=is_much), front)
    reader = segment_reader(tokenizer)
    if reader is None or END in reader.cut_out or any(END in piece and piece != END for piece in reader.pieces):
        return None
    compiled = load_compiled_code() if is_much and reader.paths is not None else None
    if compiled is None:
        return partial(SegmentEncoder, tokenizer, reader)
    return lambda notice: compiled(tokenizer, reader, notice, partial(SegmentEncoder, tokenizer, reader, notice))


def load_compiled_code() -> "type[PathEncoder] | None":
    """The encoder that is compiled, ready; None where numba is not here, or is made for another numpy."""
    try:
        from megatron_ext.data.prepare.path_encoder import PathEncoder, load  # slow to import
    except ImportError:
        return None
    load()
    return PathEncoder


class SpacedEncoder:
    """Encodes for a tokenizer that puts a space in front of a text, by an encoder that does not."""

    def __init__(self, encoder: Encoder, front: Callable[[str], str]) -> None:
        self._encoder, self._front = encoder, front

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """See `Encoder`."""
        return self._encoder.encode([self._front(text) for text in texts])

    def why_not(self, text: str) -> str | None:
        """See `Encoder`."""
        return self._encoder.why_not(self._front(text))


class BatchEncoder:
    """Encodes by the tokenizer's library."""

    def __init__(self, tokenizer: Tokenizer, notice: Notice = _deaf) -> None:
        self._tokenizer, self._notice, self._dtype = tokenizer, notice, token_dtype(tokenizer.vocab_size)

    @cached_property
    def _long(self) -> LongTexts:
        return LongTexts(self._tokenizer)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """See `Encoder`."""
        self._notice(texts)
        ids = [np.empty(0, dtype=self._dtype)]
        batch: list[str] = []
        size = 0
        for text in texts:
            if len(text) > PART:
                ids += [*self._ids_of(batch), *self._long.ids(text), np.array([self._tokenizer.eod], dtype=self._dtype)]
                batch, size = [], 0
                continue
            batch.append(text)
            size += len(text)
            if size > PART:
                ids += self._ids_of(batch)
                batch, size = [], 0
        return np.concatenate([*ids, *self._ids_of(batch)])

    def why_not(self, text: str) -> str | None:
        """See `Encoder`."""
        return self._long.why_not(text)

    def _ids_of(self, texts: list[str]) -> list[np.ndarray]:
        ids: list[int] = []
        for read in self._tokenizer.encode_batch(texts) if texts else []:
            ids += read
            ids.append(self._tokenizer.eod)
        return [np.array(ids, dtype=self._dtype)]


class SegmentEncoder:
    """Encodes by a table of segments; see the head of this file."""

    def __init__(self, tokenizer: Tokenizer, reader: SegmentReader, notice: Notice = _deaf) -> None:
        self._tokenizer, self._reader, self._notice = tokenizer, reader, notice
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._may_cut = np.ones(1 << _PAIR_BITS, dtype=bool)
        self._may_cut[_pairs_within(reader.pieces)] = False
        self._hashes = [SegmentHash(multiplier) for multiplier in _MULTIPLIERS]
        self._table = SegmentTable(self._dtype)
        self._cut_out = np.array(list(reader.cut_out.values()), dtype=self._dtype)
        self._is_cut = reader.reads_apart or reader.scores is not None

    @cached_property
    def _long(self) -> LongTexts:
        return LongTexts(self._tokenizer)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """See `Encoder`."""
        ids: list[np.ndarray] = []
        batch: list[str] = []
        size = 0
        for text in texts:
            if len(text) > _BATCH or END in text:
                ids += [self._ids_of(batch), self._ids_of_one(text)]
                batch, size = [], 0
                continue
            batch.append(text)
            size += len(text)
            if size > _BATCH:
                ids.append(self._ids_of(batch))
                batch, size = [], 0
        ids.append(self._ids_of(batch))
        return np.concatenate(ids)

    def why_not(self, text: str) -> str | None:
        """See `Encoder`."""
        if self._reader.scores is not None or len(text) <= PART:
            return None
        windows = self._windows(text) if self._is_cut else [text]
        return next((why for window in windows if (why := self._long.why_not(window)) is not None), None)

    def _ids_of(self, texts: list[str]) -> np.ndarray:
        """Ids of documents that are short, each with its end."""
        if not texts:
            return np.empty(0, dtype=self._dtype)
        ends_D = np.cumsum([len(text) + 1 for text in texts]) - 1
        return self._look_up("".join(text + END for text in texts), ends_D)

    def _ids_of_one(self, text: str) -> np.ndarray:
        """Ids of a document that is long, or holds what stands for the end of one."""
        end = np.array([self._tokenizer.eod], dtype=self._dtype)
        if not self._is_cut:
            self._notice([text])
            return np.concatenate([*self._long.ids(text), end])
        scores, parts, total = self._reader.scores, [end[:0]], 0.0
        for window in self._windows(text):
            parts.append(ids := self._ids_of_window(window, total))
            if scores is not None:
                cut_out = np.flatnonzero(np.isin(ids, self._cut_out))
                total = scores.after(0.0 if len(cut_out) else total, ids[cut_out[-1] + 1 :] if len(cut_out) else ids)
        return np.concatenate([*parts, end])

    def _ids_of_window(self, window: str, total: float) -> np.ndarray:
        """Ids of a part of a long text, which stands behind scores of that total, where they count."""
        scores = self._reader.scores
        if window != END and len(window) <= 2 * _BATCH:
            return self._look_up(window + END, np.array([len(window)]), total)[:-1]
        self._notice([window])
        if scores is None:
            return np.concatenate(self._long.ids(window))
        return np.array(scores.read(window, total)[0], dtype=self._dtype)

    def _windows(self, text: str) -> Iterator[str]:
        """A long text in pieces that end with a line, or where no token can be, and END by itself."""
        start = 0
        while start < len(text):
            end = text.find(END, start, start + _BATCH + 1)
            if end >= 0:
                stop = end if end > start else end + 1
            elif len(text) - start <= _BATCH:
                stop = len(text)
            else:
                stop = self._reader.reads_lines and text.rfind("\n", start, start + _BATCH) + 1
                stop = stop or self._cut_behind(text, start)
            yield text[start:stop]
            start = stop

    def _cut_behind(self, text: str, start: int) -> int:
        """Where a window that begins at `start` ends within a line, or, where that cannot be, with the text."""
        for at in range(start, len(text), _BATCH):
            codes = codes_of(text[at : at + _BATCH + 1])
            alone = (codes[1:] == ord(END)) | (codes[1:] == ord("\n")) & self._reader.reads_lines
            cuts = np.flatnonzero(self._may_cut[_pair_hashes(codes)] | alone)
            if len(cuts) and at == start:
                return at + int(cuts[-1]) + 1
            if len(cuts):  # behind one segment that is long, or tokens that are cut out of that
                stop = at + int(cuts[0]) + 1
                return self._reader.first_place(text, start, stop) or stop
        return self._reader.first_place(text, start, len(text)) or len(text)

    def _look_up(self, text: str, ends_D: np.ndarray, total: float = 0.0) -> np.ndarray:
        """Ids of `text`, which has END at the places `ends_D`, where documents end; `total` of scores before it."""
        codes_C = codes_of(text)
        cut_C = self._may_cut[_pair_hashes(codes_C)]
        breaks = self._breaks(text, codes_C, ends_D)
        for places in breaks:
            cut_C[places[(places > 0) & (places <= len(cut_C))] - 1] = True
        starts_S = np.concatenate(([0], np.flatnonzero(cut_C) + 1))
        keys_S, checks_S = (made(codes_C, starts_S) for made in self._hashes)
        counts_S, offsets_S, missing = self._table.find(keys_S, checks_S)
        if len(missing):
            stops = np.append(starts_S[1:], len(text))[missing]
            new = [text[start:stop] for start, stop in zip(starts_S[missing].tolist(), stops.tolist(), strict=True)]
            counts_S[missing], offsets_S[missing] = self._read(new, keys_S[missing], checks_S[missing])
        if not counts_S.all():
            self._read_unclear(_Text(text, codes_C, *breaks, total), starts_S, counts_S, offsets_S)
        return gather(self._table.tokens, counts_S, offsets_S)

    def _breaks(self, text: str, codes_C: np.ndarray, ends_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where ends of documents, and tokens that the library cuts out of them, begin and end."""
        starts, stops, _ = self._reader.places(text, codes_C)
        return np.sort(np.concatenate([ends_D, starts])), np.sort(np.concatenate([ends_D + 1, stops]))

    def _read(self, segments: list[str], keys: np.ndarray, checks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read segments that are not in the table, and keep them; tokens of each, 0 where not clear, and where."""
        first: dict[str, int] = {}
        number = np.array([first.setdefault(segment, len(first)) for segment in segments])
        texts = list(first)
        self._notice(texts)
        cut_out: dict[str, list[int] | None] = {token: [number] for token, number in self._reader.cut_out.items()}
        cut_out[END] = [self._tokenizer.eod]
        short = [text for text in texts if len(text) <= _LONGEST_SEGMENT and text not in cut_out]
        known = dict(zip(short, self._reader.read(short), strict=True)) | cut_out
        ids = [one if (one := known.get(text)) and len(one) <= MOST_TOKENS else [] for text in texts]
        where = np.zeros(len(texts), dtype=np.int64)
        where[number] = np.arange(len(number))
        counts, offsets = self._table.add(keys[where], checks[where], ids)
        return counts[number], offsets[number]

    def _read_unclear(self, text: "_Text", starts_S: np.ndarray, counts_S: np.ndarray, offsets_S: np.ndarray) -> None:
        """Read the segments without tokens, some of them with their whole lines or documents, and put these in."""
        unclear = np.flatnonzero(counts_S == 0)
        bounds = np.append(starts_S, len(text.text))
        before = np.searchsorted(text.starts, starts_S[unclear])  # breaks, for each
        line_starts = np.concatenate(([0], text.stops))
        begins, ends = unclear, unclear + 1
        read: Sequence[list[int]]
        if self._reader.scores is not None:
            firsts = np.searchsorted(starts_S, line_starts[before])
            line = Line(text.codes, bounds, counts_S, offsets_S, self._table.tokens, unclear, firsts, text.total)
            read = self._reader.scores.read_behind(line, text.text)
        else:
            if not self._reader.reads_apart:
                before = np.unique(before)
                begins, ends = np.searchsorted(starts_S, [line_starts[before], text.starts[before]])
            spans = zip(bounds[begins].tolist(), bounds[ends].tolist(), strict=True)
            read = self._tokenizer.encode_batch([text.text[start:stop] for start, stop in spans])
        counts, offsets = self._table.lend(read)
        for begin, end, count, offset in zip(begins.tolist(), ends.tolist(), counts, offsets, strict=True):
            counts_S[begin:end] = 0
            counts_S[begin], offsets_S[begin] = count, offset


@dataclass(frozen=True)
class _Text:
    """Documents end to end, or a part of one; where it is broken, and the sum of scores before it."""

    text: str
    codes: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    total: float


def _pair_hashes(codes_C: np.ndarray) -> np.ndarray:
    """A number below 2^_PAIR_BITS for each two neighbours, uint32 [C - 1]. Two pairs of one number bind each other."""
    left, right = codes_C[:-1] * np.uint32(0x9E3779B1), codes_C[1:] * np.uint32(0x85EBCA6B)
    return (left ^ right) >> np.uint32(32 - _PAIR_BITS)


def _pairs_within(pieces: Sequence[str]) -> np.ndarray:
    """Hashes of all neighbours within `pieces`; a space and its mark stand for each other."""
    pairs = {pair for piece in pieces for pair in zip(piece, piece[1:], strict=False)}
    either = {
        left + right
        for a, b in pairs
        for left in (SPACES if a in SPACES else a)
        for right in (SPACES if b in SPACES else b)
    }
    flat = codes_of("".join(either))
    return _pair_hashes(flat)[::2] if len(flat) else np.empty(0, dtype=np.uint32)
