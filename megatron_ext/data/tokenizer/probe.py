"""Texts on which two tokenizers are compared: what is easy to get wrong, and what a vocabulary is made of."""

import random
from collections.abc import Iterable

HARD_TEXTS = (
    "",
    " a",
    "a ",
    "  a  b   c\t\td ",
    "\n",
    "a\n\n\n b\r\nc\r d\u2028e\x0bf",
    *(" " * n + "x" + "\n" * n for n in (2, 3, 4, 7, 8, 16, 30)),
    "The quick brown fox didn't jump; it's 3.14159 % of 1,000,000 and 2²⁷.",
    "def f(x):\n    return {'a': x ** 2}  # comment\n\tif x != 0: pass\n",
    "吾輩は猫である。名前はまだ無い。「どこで」生れたか、とんと見当がつかぬ！",
    "ｶﾞｷﾞｸﾞ ガギグ カ\u3099 ㍿ ① ﬁ Å A\u030a e\u0301 é Ⅷ",
    "सूरज पूरब में उगता है। क्षत्रिय ज्ञान श्री र्\u200dक",
    "العربية ‏עברית‎ ไทย 한국어 조선말 \u1100\u1161\u11a8",
    "👩\u200d👩\u200d👧\u200d👦 👍🏽 🇯🇵 \ufe0f☺️ 🏴\U000e0067\U000e0062\U000e007f",
    "\ufeffbom \u00a0nbsp \u3000wide \u200bzero\u00adsoft \ufffd \ufffe \U0010ffff \x00\x01\x7f\x80",
    "▁ ▁▁a ▁b▁ <0x0A><0xE3> Ġword Ċ ##ing @@ </w>",
    "<s></s><unk><pad><|endoftext|><|im_start|>user\n<|im_end|>[INST] [/INST] <bos><eos>",
    "aaaaaaaaaaaaaaaaaaaaaaaa bbbb!!!!????....----====____****####",
    "DžǆİıßẞΣςſK ﷺ 𝒜𝓫𝔠 𠮷野家 ﾟﾞ",
)
"""Spaces, line ends, digits, scripts, joiners, code points that normalisation changes, special tokens spelt out."""


def nasty_texts(count: int = 300) -> list[str]:
    """More of the same, for proofs that may take their time: runs of spaces of every length, random Unicode.

    Half of the random texts are of characters that are near each other, as in words; the texts are always the same.
    """
    spaces = [text for n in range(1, 31) for text in (" " * n, f"a{' ' * n}b", f"{' ' * n}\n{' ' * n}x")]
    ends = ["\t", "\t\t x", "a\r\nb\r\n", "\r", "\n \n", " \t ", "x \n", "0123456789", "３．１４ ²", "１２३ १२३"]
    generator = random.Random(0)
    return [*spaces, *ends, *(_random_text(generator) for _ in range(count))]


_PLANES = ((0x0, 0x300), (0x300, 0x3100), (0x3000, 0xA000), (0xA000, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000))


def _random_text(generator: random.Random) -> str:
    plane = generator.choice(_PLANES)
    first = generator.randrange(*plane)
    near = (max(first - 16, plane[0]), min(first + 16, plane[1]))
    characters = [
        chr(generator.randrange(*generator.choice((near, near, (0x20, 0x7F), generator.choice(_PLANES)))))
        for _ in range(generator.randrange(1, 24))
    ]
    return "".join(characters)


def texts_of(pieces: Iterable[str], *, seed: int = 0, words: int = 12) -> list[str]:
    """Every piece of a vocabulary in `pieces`, by itself and among others, `words` of them to a text."""
    pieces = list(pieces)
    generator, texts = random.Random(seed), list(pieces)
    for _ in range(2):
        generator.shuffle(pieces)
        texts += ["".join(pieces[start : start + words]) for start in range(0, len(pieces), words)]
    return texts
