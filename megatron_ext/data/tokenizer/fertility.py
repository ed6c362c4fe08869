"""What a tokenizer makes of text: characters a token, tokens that are bytes or single characters, names kept whole."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tokenizers import pre_tokenizers

from megatron_ext.data.tokenizer.model_file import SPACE
from megatron_ext.data.tokenizer.names import names_in
from megatron_ext.data.tokenizer.reading import Tokenizer

_LONGEST_WORD = 15
"""Characters of what white space separates, on average, up to which it counts as words."""
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Fertility:
    """Of one tokenizer on one text."""

    characters: int
    bytes: int
    tokens: int
    fallback: int
    """Tokens that are single bytes for want of a piece, or parts of a character."""
    single: int
    """Tokens that are one character."""
    used: frozenset[int]
    """Ids that occur."""
    names: int = 0
    """Occurrences of names."""
    names_whole: int = 0
    """Those that are within one token."""
    words: int = 0
    """What white space separates."""

    @property
    def tokens_a_word(self) -> float | None:
        """Less is better; None for text that is not written in words with spaces between them."""
        if not self.words or self.characters > _LONGEST_WORD * self.words:
            return None
        return self.tokens / self.words

    @property
    def characters_a_token(self) -> float:
        """More is better: the same text is fewer tokens."""
        return self.characters / max(self.tokens, 1)

    @property
    def bytes_a_token(self) -> float:
        """Of UTF-8."""
        return self.bytes / max(self.tokens, 1)


@dataclass(frozen=True)
class Kinds:
    """Ids of some kinds of tokens."""

    fallback: frozenset[int]
    single: frozenset[int]


def kinds_of(vocabulary: dict[str, int], *, byte_level: bool = False) -> Kinds:
    """The kinds of the tokens of a vocabulary, from how they are spelt.

    Args:
        byte_level: its tokens are spelt in GPT-2's alphabet of bytes.
    """
    fallback, single = set(), set()
    for token, number in vocabulary.items():
        if not byte_level and _BYTE_PIECE.fullmatch(token):
            fallback.add(number)
            continue
        text = _of_bytes(token) if byte_level else token.replace(SPACE, " ").removeprefix("##")
        if text is None:
            fallback.add(number)
        elif len(text) == 1:
            single.add(number)
    return Kinds(frozenset(fallback), frozenset(single))


def _alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: printable ones are themselves, the others follow from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    made = {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}
    assert made.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    return made


_BYTES = _alphabet()


def _of_bytes(token: str) -> str | None:
    """The text of a token of bytes; None where they are not whole characters."""
    try:
        return bytes(_BYTES[character] for character in token).decode()
    except KeyError:
        return token  # an added token, spelt as it is
    except UnicodeDecodeError:
        return None


def measure(
    encode: Callable[[str], Sequence[int]], kinds: Kinds, texts: Iterable[str], names: tuple[int, int] = (0, 0)
) -> Fertility:
    """Count what `encode` makes of `texts`; `names` are occurrences and those that are whole."""
    characters = size = tokens = fallback = single = words = 0
    used: set[int] = set()
    for text in texts:
        ids = encode(text)
        characters, size, tokens = characters + len(text), size + len(text.encode()), tokens + len(ids)
        fallback += sum(number in kinds.fallback for number in ids)
        single += sum(number in kinds.single for number in ids)
        used.update(ids)
        words += len(text.split())
    return Fertility(characters, size, tokens, fallback, single, frozenset(used), *names, words)


def measure_tokenizer(tokenizer: Tokenizer, texts: Sequence[str], names: Sequence[str] = ()) -> Fertility:
    """Measure a tokenizer on `texts`, and on the occurrences of `names` in them."""
    kinds = kinds_of(tokenizer.vocabulary, byte_level=is_byte_level(tokenizer))
    return measure(tokenizer.encode, kinds, texts, names_kept(tokenizer, texts, names) if names else (0, 0))


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether tokens are spelt in GPT-2's alphabet of bytes."""
    if tokenizer.backend is None or tokenizer.backend.decoder is None:
        return False
    return '"ByteLevel"' in json.dumps(json.loads(tokenizer.backend.to_str())["decoder"])


def names_kept(tokenizer: Tokenizer, texts: Iterable[str], names: Sequence[str]) -> tuple[int, int]:
    """Occurrences of `names` in `texts`, and how many of them are within one token.

    None for a tokenizer that cannot tell where in a text its tokens stand.
    """
    if tokenizer.backend is None:
        return 0, 0
    occurrences = whole = 0
    for text, spans in names_in(names, texts):
        offsets = tokenizer.backend.encode(text, add_special_tokens=False).offsets
        occurrences += len(spans)
        whole += sum(_is_whole(span, offsets) for span in spans)
    return occurrences, whole


def _is_whole(span: tuple[int, int], offsets: Sequence[tuple[int, int]]) -> bool:
    """Whether one token alone has characters of `span`."""
    return sum(start < span[1] and stop > span[0] for start, stop in offsets) == 1
