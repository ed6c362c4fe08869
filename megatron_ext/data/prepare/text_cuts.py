"""Where a text may be cut so that the tokenizers library gives its parts the ids of the whole.

The library reads a text in steps: added tokens are cut out, each stretch between is normalized, split into words, and
each word is read by itself. At a cut, each of these steps must do on both sides what it does in the whole. Where a step
is understood here, this follows from the two characters at the sides. They are a place for a cut where

- a word ends there, whatever stands around; or
- the model merges pairs, and the last token before it and the first one behind it stay two when read together: merges
  go from the first rule to the last, so the first one that got across would also be made of these two tokens alone.
"""

import base64
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from tokenizers.normalizers import Precompiled

from megatron_ext.data.prepare.regex_pairs import NotUnderstoodError, RegexPairs, is_settled
from megatron_ext.data.tokenizer import Tokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the library splits by where ByteLevel says `use_regex`."""
_SPACE, _MARK = " ", "▁"

Pair = tuple[str, str]
_Normalize = Callable[[Pair], set[Pair]]
"""What a step may make of two neighbours; nothing where it could do something else once they are apart."""
_Split = Callable[[Pair], bool | None]
"""Whether a word always ends between two neighbours; None where splitting could differ once they are apart."""


class Cut(NamedTuple):
    """A place for a cut.

    Attributes:
        stop: where a part ends.
        begin: where the next one begins: a space between them that the library puts there by itself is skipped.
        is_sure: a word ends there; else it is one only where `stay_apart` says so of the tokens at its sides.
    """

    stop: int
    begin: int
    is_sure: bool


class TextCuts:
    """Finds places for cuts. Made by `text_cuts`.

    Args:
        steps: what normalizes, and what splits.
        merges: the model is one that `stay_apart` may be asked of.
        first: if the library puts a space before each stretch between added tokens, what these begin with.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        steps: tuple[Sequence[_Normalize], Sequence[_Split]],
        *,
        merges: bool,
        first: frozenset[str] | None,
    ) -> None:
        assert tokenizer.fast is not None
        self._normalizers, self._splits = steps
        self._merges, self._first = merges, first
        self._known: dict[str, bool | None] = {}
        self._model = tokenizer.fast.model
        self._pieces = {number: piece for piece, number in tokenizer.vocabulary.items()} if merges else {}

    def last(self, text: str, start: int, stop: int) -> Cut | None:
        """The last place for a cut behind `start` and not behind `stop`."""
        return next((cut for at in range(stop, start, -1) if (cut := self._at(text, at)) is not None), None)

    def first(self, text: str, start: int, stop: int) -> Cut | None:
        """The first one."""
        return next((cut for at in range(start + 1, stop + 1) if (cut := self._at(text, at)) is not None), None)

    def _at(self, text: str, at: int) -> Cut | None:
        both = text[at - 1 : at + 1]
        if both not in self._known:
            self._known[both] = self._is_place(both)
        if (is_sure := self._known[both]) is None:
            return None
        if self._first is None:
            return Cut(at, at, is_sure)
        # What follows the space must begin a stretch of its own in the same way.
        behind = text[at + 1 : at + 2]
        is_plain = behind.isalpha() and is_settled(behind) and behind not in self._first
        return Cut(at, at + 1, is_sure) if is_plain else None

    def _is_place(self, both: str) -> bool | None:
        """See `Cut.is_sure`; None where there is none."""
        if len(both) < 2 or not all(map(is_settled, both)) or both[0].isspace():
            return None
        if self._first is not None and both[1] != _SPACE:
            return None
        pairs: set[Pair] = {(both[0], both[1])}
        for normalize in self._normalizers:
            made = [normalize(pair) for pair in pairs]
            if not all(made):
                return None
            pairs = set().union(*made)
        ends = [[split(pair) for split in self._splits] for pair in pairs]
        if any(None in found for found in ends):
            return None
        is_sure = all(True in found for found in ends)
        return is_sure if is_sure or self._merges else None

    def stay_apart(self, left: int, right: int) -> bool:
        """Whether two tokens are read again where their texts stand side by side."""
        read = self._model.tokenize(self._pieces[left] + self._pieces[right])
        return [token.id for token in read] == [left, right]


def text_cuts(tokenizer: Tokenizer) -> TextCuts | None:
    """Where texts of `tokenizer` may be cut; None where one of its steps is not understood here."""
    if tokenizer.fast is None:
        return None
    content = json.loads(tokenizer.fast.to_str())
    plain = [token for token in content["added_tokens"] if not token["special"]]
    if any(token[name] for token in plain for name in ("lstrip", "rstrip", "single_word")):
        return None
    if not _has_no_memory(content["model"], tokenizer):
        return None
    try:
        normalizers = [_normalize_of(part) for part in steps_of(content["normalizer"], "normalizers")]
        splits = _splits(content["pre_tokenizer"])
    except NotUnderstoodError:
        return None
    # Added tokens are looked for before the text is normalized, or after.
    within = {pair for token in plain for pair in _pairs_of(token["content"])}
    steps = [_unless_in(within), *normalizers, _unless_in(within)]
    puts_space = any(part["type"] == "Prepend" for part in steps_of(content["normalizer"], "normalizers"))
    first = frozenset(token["content"][:1] for token in plain) if puts_space else None
    return TextCuts(tokenizer, (steps, splits), merges=_merges_in_order(content["model"]), first=first)


def _unless_in(pairs: set[Pair]) -> _Normalize:
    return lambda pair: set() if pair in pairs else {pair}


def _pairs_of(content: str) -> set[Pair]:
    written = (content, content.replace(_SPACE, _MARK))
    return {pair for text in written for pair in zip(text, text[1:], strict=False)}


def steps_of(step: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """The steps of a sequence, or the one that there is."""
    if step is None:
        return []
    return [one for part in step[name] for one in steps_of(part, name)] if step["type"] == "Sequence" else [step]


def _has_no_memory(model: Mapping[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether a word is read by itself, also where a text that spells special tokens is read again without these."""
    if model["type"] != "BPE":
        return True
    special = {piece for piece, number in tokenizer.vocabulary.items() if number in tokenizer.special_ids}
    return not model.get("dropout") and special.isdisjoint(part for pair in _merges(model) for part in pair)


def _merges(model: Mapping[str, Any]) -> list[list[str]]:
    return [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]


def _merges_in_order(model: Mapping[str, Any]) -> bool:
    """Whether a token is made by earlier rules than those that it is merged by, and by no others."""
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] != "BPE" or model.get("ignore_merges") or affixes:
        return False
    pairs = _merges(model)
    made = {left + right: number for number, (left, right) in enumerate(pairs)}
    return all(made.get(part, -1) < number for number, pair in enumerate(pairs) for part in pair)


def _normalize_of(step: Mapping[str, Any]) -> _Normalize:
    kind = step["type"]
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return _unless_changed(partial(unicodedata.normalize, kind))
    if kind == "Precompiled":  # of SentencePiece: by what a reader takes for one character
        return _unless_changed(Precompiled(base64.b64decode(step["precompiled_charsmap"])).normalize_str)
    if kind == "Strip":
        return lambda pair: set() if step["strip_left"] and pair[1].isspace() else {pair}
    if kind == "Prepend" and step["prepend"] == _MARK:
        return lambda pair: {pair}
    if kind == "Replace":
        return _replace(step["pattern"], step["content"])
    raise NotUnderstoodError(kind)


def _unless_changed(normalize: Callable[[str], str]) -> _Normalize:
    """Neither is changed, nor composed with the other; `is_settled` leaves marks out. A line end may become a space."""

    def unchanged(pair: Pair) -> set[Pair]:
        left, right = pair
        # A consonant of Hangul or a vowel sign may be composed with what stands before it.
        composes = any("\u1100" <= one <= "\u11ff" or unicodedata.category(one)[0] == "M" for one in pair)
        made = normalize(right)
        is_kept = made == right or (made == _SPACE and right.isspace())
        if composes or not is_kept or normalize(left) != left or normalize(left + right) != left + made:
            return set()
        return {(left, made)}

    return unchanged


def _replace(pattern: Mapping[str, str], new: str) -> _Normalize:
    old = pattern.get("String", "")
    if len(old) == 1 and new:
        return lambda pair: {(new[-1] if pair[0] == old else pair[0], new[0] if pair[1] == old else pair[1])}
    if "Regex" not in pattern or not new:
        raise NotUnderstoodError("Replace")
    pairs = RegexPairs(pattern["Regex"])

    def replaced(pair: Pair) -> set[Pair]:
        left, right = pair
        if pairs.may_touch(left) or pairs.may_join(left, right):
            return set()
        return {pair, (left, new[0])} if pairs.may_touch(right) else {pair}

    return replaced


def _splits(step: Mapping[str, Any] | None) -> list[_Split]:
    parts = steps_of(step, "pretokenizers")
    if any(part["type"] == "ByteLevel" for part in parts[:-1]):
        raise NotUnderstoodError("ByteLevel")  # what comes after it sees other characters
    return [split for part in parts for split in _split_of(part)]


def _split_of(step: Mapping[str, Any]) -> list[_Split]:
    kind = step["type"]
    if kind == "ByteLevel":
        pairs = [_words(RegexPairs(_GPT2))] if step["use_regex"] else []
        return [*pairs, *([_begins_with_space] if step["add_prefix_space"] else [])]
    if kind == "Split":
        return [_split_by_pattern(step)]
    if kind == "Digits":
        return [lambda pair: None if all(unicodedata.category(one)[0] == "N" for one in pair) else False]
    if kind == "Metaspace":
        return _split_by_mark(step)
    if kind in ("WhitespaceSplit", "Whitespace", "BertPreTokenizer"):
        return [lambda pair: True if pair[1] == _SPACE else None]
    raise NotUnderstoodError(kind)


def _words(pairs: RegexPairs) -> _Split:
    def split(pair: Pair) -> bool | None:
        if pairs.may_join(*pair):
            return None
        return any(map(pairs.always_matches, pair))

    return split


def _begins_with_space(pair: Pair) -> bool | None:
    """The library puts a space before every text that has none there."""
    return False if pair[1] == _SPACE else None


def _split_by_pattern(step: Mapping[str, Any]) -> _Split:
    if step["invert"]:
        raise NotUnderstoodError("invert")
    if "Regex" in step["pattern"]:
        pairs = RegexPairs(step["pattern"]["Regex"])
        if step["behavior"] == "Isolated":
            return _words(pairs)
        return lambda pair: None if any(map(pairs.may_touch, pair)) or pairs.may_join(*pair) else False
    string = step["pattern"]["String"]
    return lambda pair: None if set(pair) & set(string) else False


def _split_by_mark(step: Mapping[str, Any]) -> list[_Split]:
    if step["replacement"] != _MARK:
        raise NotUnderstoodError("Metaspace")
    spaces = (_SPACE, _MARK)
    in_front = [] if step["prepend_scheme"] == "never" else [lambda pair: False if pair[1] in spaces else None]
    words = [lambda pair: pair[1] in spaces] if step.get("split", True) else []
    return [*in_front, *words]
