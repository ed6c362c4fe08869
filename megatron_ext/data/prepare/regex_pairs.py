"""Which two characters can stand side by side within one match of a regular expression of a pre-tokenizer.

The expression is read as an automaton of its character classes (Glushkov, 1961): which of them may follow each other.
Where two neighbours belong to no such pair, no attempt to match ever gets across them, so that a text that is cut there
is split as the whole is. What is not understood here (looking behind, anchors, back references) is refused.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field

Class = Callable[[str], bool]
"""Whether a character belongs to it."""
_WHITE = frozenset("\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | set(map(chr, range(0x2000, 0x200B)))
_NAMED = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v"}
_CATEGORIES = ("L", "M", "N", "P", "S", "Z", "C")


class NotUnderstoodError(Exception):
    """The expression has something whose matches are not followed here."""


def is_settled(character: str) -> bool:
    """Whether every version of Unicode since 3.2, and every library, puts the character into the same classes."""
    category = unicodedata.category(character)
    if category[0] == "C" and character not in "\t\n\r":
        return False
    return unicodedata.ucd_3_2_0.category(character) == category and not unicodedata.combining(character)


@dataclass(frozen=True)
class _Node:
    """A part of an expression: whether it may match nothing, and the numbers of its classes at both ends."""

    is_empty: bool
    first: frozenset[int] = frozenset()
    last: frozenset[int] = frozenset()


@dataclass
class RegexPairs:
    """The pairs of an expression.

    Attributes:
        classes: all in the expression, by number; looking ahead has a number too, and a class of nothing.
        follow: numbers of classes that may match neighbours.
        looked_from: numbers of classes behind whose character the expression may look ahead.
        alone: numbers of classes of which one character is a match.
    """

    pattern: str
    classes: list[Class] = field(default_factory=list)
    follow: set[tuple[int, int]] = field(default_factory=set)
    looked_from: set[int] = field(default_factory=set)
    alone: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Raises NotUnderstoodError."""
        parser = _Parser(self.pattern)
        whole = parser.alternatives()
        if parser.rest() or whole.is_empty:
            raise NotUnderstoodError(self.pattern)
        looks = parser.looks
        self.classes = parser.classes
        self.follow = {(one, two) for one, two in parser.follow if one not in looks and two not in looks}
        self.looked_from = {one for one, two in parser.follow if two in looks}
        under_condition = {two for one, two in parser.follow if one in looks}
        self.alone = set(whole.first & whole.last) - looks - self.looked_from - under_condition - parser.several

    def may_join(self, left: str, right: str) -> bool:
        """Whether a match, or an attempt at one, can get from `left` to `right`, or look at that."""
        lefts = {number for number, is_in in enumerate(self.classes) if is_in(left)}
        if lefts & self.looked_from:
            return True
        return any(one in lefts and self.classes[two](right) for one, two in self.follow)

    def may_touch(self, character: str) -> bool:
        """Whether a match can have the character."""
        return any(is_in(character) for is_in in self.classes)

    def always_matches(self, character: str) -> bool:
        """Whether the character is a match by itself, so that it is in one wherever it stands."""
        return any(self.classes[number](character) for number in self.alone)


class _Parser:
    """Reads an expression; numbers its classes."""

    def __init__(self, pattern: str) -> None:
        self._pattern, self._at, self._folds = pattern, 0, False
        self.classes: list[Class] = []
        self.follow: set[tuple[int, int]] = set()
        self.looks: set[int] = set()
        self.several: set[int] = set()

    def rest(self) -> str:
        """What was not read."""
        return self._pattern[self._at :]

    def _take(self, text: str) -> bool:
        if not self._pattern.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def _next(self) -> str:
        if self._at >= len(self._pattern):
            raise NotUnderstoodError(self._pattern)
        self._at += 1
        return self._pattern[self._at - 1]

    def alternatives(self) -> _Node:
        """Parts that `|` divides."""
        node = self._sequence()
        while self._take("|"):
            other = self._sequence()
            node = _Node(node.is_empty or other.is_empty, node.first | other.first, node.last | other.last)
        return node

    def _sequence(self) -> _Node:
        node = _Node(is_empty=True)
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            part = self._repeated(self._single())
            self.follow |= {(one, two) for one in node.last for two in part.first}
            node = _Node(
                node.is_empty and part.is_empty,
                node.first | (part.first if node.is_empty else frozenset()),
                part.last | (node.last if part.is_empty else frozenset()),
            )
        return node

    def _repeated(self, node: _Node) -> _Node:
        fewest, most = self._counts()
        if most == 1 and fewest == 1:
            return node
        if most > 1:
            self.follow |= {(one, two) for one in node.last for two in node.first}
        if fewest > 1:
            self.several |= node.first
        _ = self._take("?") or self._take("+")  # lazy, or not given back: the pairs are the same
        return _Node(node.is_empty or fewest == 0, node.first, node.last)

    def _counts(self) -> tuple[int, int]:
        for sign, counts in {"?": (0, 1), "*": (0, 2), "+": (1, 2)}.items():
            if self._take(sign):
                return counts
        if not self._take("{"):
            return 1, 1
        end = self._pattern.find("}", self._at)
        fewest, comma, most = self._pattern[self._at : end].partition(",")
        if end < 0 or not fewest.isdecimal() or (most and not most.isdecimal()):
            raise NotUnderstoodError(self._pattern)
        self._at = end + 1
        return int(fewest), int(most) if most else (2 if comma else int(fewest))

    def _single(self) -> _Node:
        if self._take("(?!") or self._take("(?="):
            return self._look()
        if self._take("("):
            return self._group()
        if self._take("["):
            return self._class(self._set())
        character = self._next()
        if character == ".":
            return self._class(lambda one: one != "\n")
        if character in "^$*+?{":
            raise NotUnderstoodError(self._pattern)
        return self._class(self._escaped() if character == "\\" else self._literal(character))

    def _group(self) -> _Node:
        before = self._folds
        if self._take("?i:"):
            self._folds = True
        elif not self._take("?:") and self._pattern.startswith("?", self._at):
            raise NotUnderstoodError(self._pattern)
        node = self.alternatives()
        if not self._take(")"):
            raise NotUnderstoodError(self._pattern)
        self._folds = before
        return node

    def _look(self) -> _Node:
        """Ahead, at one character: a class of nothing that is remembered."""
        before = len(self.classes)
        node = self.alternatives()
        if not self._take(")") or node.is_empty or any(n >= before for pair in self.follow for n in pair):
            raise NotUnderstoodError(self._pattern)
        del self.classes[before:]
        self.looks.add(before)
        self.classes.append(lambda one: False)
        return _Node(True, frozenset([before]), frozenset([before]))

    def _class(self, is_in: Class) -> _Node:
        self.classes.append(is_in)
        number = frozenset([len(self.classes) - 1])
        return _Node(False, number, number)

    def _literal(self, character: str) -> Class:
        if not self._folds:
            return lambda one: one == character
        # One character may stand for several: a ligature for its letters.
        return lambda one: character.casefold() in one.casefold()

    def _set(self) -> Class:
        """What stands in brackets."""
        is_negated, members = self._take("^"), []
        if is_negated and self._folds:
            raise NotUnderstoodError(self._pattern)
        while not self._take("]"):
            character = self._next()
            if character == "[" or self._pattern.startswith("&&", self._at - 1):
                raise NotUnderstoodError(self._pattern)
            if character == "\\":
                members.append(self._escaped())
            elif self._pattern.startswith("-", self._at) and not self._pattern.startswith("-]", self._at):
                self._at += 1
                members.append(self._range(character, self._next()))
            else:
                members.append(self._literal(character))
        return lambda one: any(is_in(one) for is_in in members) != is_negated

    def _range(self, first: str, last: str) -> Class:
        if last in "\\[" or self._folds:
            raise NotUnderstoodError(self._pattern)
        return lambda one: first <= one <= last

    def _escaped(self) -> Class:
        character = self._next()
        if character in _NAMED:
            return self._literal(_NAMED[character])
        if character in "sS":
            return lambda one: (one in _WHITE) == (character == "s")
        if character in "dD":
            return lambda one: (unicodedata.category(one) == "Nd") == (character == "d")
        if character in "pP" and self._take("{"):
            end = self._pattern.find("}", self._at)
            name, self._at = self._pattern[self._at : end], end + 1
            if end < 0 or name[:1] not in _CATEGORIES or len(name) > 2:
                raise NotUnderstoodError(self._pattern)
            return lambda one: unicodedata.category(one).startswith(name) == (character == "p")
        if character.isalnum():
            raise NotUnderstoodError(self._pattern)
        return self._literal(character)
