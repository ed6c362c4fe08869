"""Reads long texts by the tokenizer's library in parts, whose ids are those of the whole.

The library takes a hundred to three hundred bytes for each character that it is given at once, and a process has less
than 500 MB for all it does. A text in which it sees one word of half a million characters is no language, and refused.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from megatron_ext.data.indexed import token_dtype
from megatron_ext.data.prepare.text_cuts import Cut, text_cuts
from megatron_ext.data.tokenizer import Tokenizer

PART = 1 << 16
"""Characters that the library is given at once, where a text can be cut."""
_LONGEST = 1 << 19
"""Characters that it is given at most."""
_AROUND, _TRIES = 1 << 12, 1000
"""Characters around a place that are read to see whether tokens end there, and how many places are tried."""
_NEAR = 256
"""The same where what was seen is proven later."""


class _Span(NamedTuple):
    """A part of a text; whether it is known that tokens end where it begins."""

    begin: int
    stop: int
    is_sure: bool


class _Read(NamedTuple):
    span: _Span
    ids: np.ndarray


class LongTexts:
    """See the head of this file."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._dtype = tokenizer, token_dtype(tokenizer.vocab_size)
        self._cuts = text_cuts(tokenizer)
        # Sums of scores reach as far as a word, which may be all of a text (see `segment_reading`).
        self._has_lines = tokenizer.fast is not None and type(tokenizer.fast.model).__name__ != "Unigram"

    def ids(self, text: str) -> list[np.ndarray]:
        """Token ids of `text`, end to end."""
        read: list[_Read] = []
        for span in self._spans(text):
            read.append(self._read(text, span))
            while len(read) > 1 and not self._are_apart(*read[-2:]):
                behind, before = read.pop(), read.pop()
                joined = _Span(before.span.begin, behind.span.stop, before.span.is_sure)
                read.append(self._read(text, joined))
        return [one.ids for one in read]

    def why_not(self, text: str) -> str | None:
        """Why the text is not read, or None."""
        if len(text) <= _LONGEST:
            return None
        longest = max(span.stop - span.begin for span in self._spans(text))
        if longest <= _LONGEST:
            return None
        return f"{longest:,} characters in which this tokenizer sees one word (at most {_LONGEST:,}); cut the document"

    def _read(self, text: str, span: _Span) -> _Read:
        return _Read(span, np.array(self._tokenizer.encode(text[span.begin : span.stop]), dtype=self._dtype))

    def _are_apart(self, before: _Read, behind: _Read) -> bool:
        if behind.span.is_sure:
            return True
        assert self._cuts is not None
        both = len(before.ids) and len(behind.ids)
        return bool(both) and self._cuts.stay_apart(int(before.ids[-1]), int(behind.ids[0]))

    def _spans(self, text: str) -> Iterator[_Span]:
        begin, is_sure = 0, True
        while len(text) - begin > PART and (cut := self._cut(text, begin)) is not None:
            yield _Span(begin, cut.stop, is_sure)
            begin, is_sure = cut.begin, cut.is_sure
        yield _Span(begin, len(text), is_sure)

    def _cut(self, text: str, begin: int) -> Cut | None:
        """Where a part that begins at `begin` ends."""
        if self._cuts is None:
            return self._line_cut(text, begin) if self._has_lines else None
        at = begin + PART + 1
        for _ in range(_TRIES):
            cut = self._cuts.last(text, begin, at - 1)
            if cut is None or cut.is_sure or self._seem_apart(text, cut):
                break
            at = cut.stop
        return self._cuts.first(text, begin + PART, len(text) - 1) if cut is None else cut

    def _seem_apart(self, text: str, cut: Cut) -> bool:
        assert self._cuts is not None
        left = self._tokenizer.encode(text[max(0, cut.stop - _NEAR) : cut.stop])
        right = self._tokenizer.encode(text[cut.begin : cut.begin + _NEAR])
        return bool(left and right) and self._cuts.stay_apart(left[-1], right[0])

    def _line_cut(self, text: str, begin: int) -> Cut | None:
        """Where a line begins with a letter and the library, given thousands of characters around, ends a token.

        Of steps that are not understood: no tokenizer of a language model looks further than one word.
        """
        at = begin + PART
        for _ in range(_TRIES):
            at = text.find("\n", at) + 1
            if at == 0 or at == len(text):
                return None
            around = text[max(begin, at - _AROUND) : at], text[at : at + _AROUND]
            if text[at].isalpha():
                left, right, both = self._tokenizer.encode_batch([*around, "".join(around)])
                if left + right == both:
                    return Cut(at, at, is_sure=True)
        return None
