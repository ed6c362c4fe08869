"""An even sample of a corpus of any size, in bounded memory: what tokenizers are trained and measured on."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_LINES = 1_000_000
MAX_CHARACTERS = 200_000_000
"""Of a sample. SentencePiece takes about 40 bytes of memory for each."""
_LONGEST_LINE = 4000


@dataclass(frozen=True)
class Sample:
    """Some texts of many, in their order."""

    texts: list[str]
    characters: int
    """Of these texts."""
    of_characters: int
    """Of all texts."""
    of_bytes: int
    """Of all texts, in UTF-8."""

    @property
    def weight(self) -> float:
        """How many characters each character of the sample stands for."""
        return self.of_characters / self.characters if self.characters else 0.0


def sample(
    texts: Iterable[str], max_texts: int = MAX_LINES, max_characters: int = MAX_CHARACTERS, *, seed: int = 0
) -> Sample:
    """Sample `texts`, each equally likely; all of them where there is room.

    Each has a random number from its place among them, and those with the smallest are kept: no more than twice the
    sample is ever held in memory.
    """
    generator, limit = random.Random(seed), 2.0
    kept: list[tuple[float, int, str]] = []
    characters = size = held = 0
    for number, text in enumerate(texts):
        draw = generator.random()
        characters, size = characters + len(text), size + len(text.encode())
        if draw >= limit:
            continue
        kept.append((draw, number, text))
        held += len(text)
        if len(kept) > 2 * max_texts or held > 2 * max_characters:
            kept, limit = _smallest(kept, max_texts, max_characters)
            held = sum(len(text) for _, _, text in kept)
    kept, _ = _smallest(kept, max_texts, max_characters)
    chosen = [text for _, text in sorted((number, text) for _, number, text in kept)]
    return Sample(chosen, sum(map(len, chosen)), characters, size)


def _smallest(
    drawn: list[tuple[float, int, str]], max_texts: int, max_characters: int
) -> tuple[list[tuple[float, int, str]], float]:
    """As many as there is room for of those with the smallest numbers, and the number that the next one has."""
    drawn = sorted(drawn)
    size = 0
    for count, (draw, _, text) in enumerate(drawn):
        size += len(text)
        if count == max_texts or (size > max_characters and count):
            return drawn[:count], draw
    return drawn, 2.0


def lines_of(documents: Iterable[str], delimiter: str = "") -> Iterator[str]:
    """The non-empty lines of `documents`, those of over 4,000 characters cut, in front of a `delimiter` if they can."""
    for document in documents:
        for line in document.split("\n"):
            start = 0
            while start < len(line):
                stop = start + _LONGEST_LINE
                if delimiter and stop < len(line):
                    # Also in front of one that would be cut in two.
                    place = line.rfind(delimiter, start + 1, stop + len(delimiter) - 1)
                    stop = place if place > 0 else stop
                yield line[start:stop]
                start = stop
