"""What a model writes, in numbers: how long, whether it stops, how much it repeats itself, in which script."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from math import sqrt

from megatron_ext.generation.sample import Continuation

_LENGTH = 4
"""Tokens of the pieces of which the repeated ones are counted."""
_ONE_SCRIPT = {"hiragana": "japanese", "katakana": "japanese", "cjk": "japanese", "katakana-hiragana": "japanese"}
"""Scripts that one language mixes. Chinese counts as Japanese here: characters alone do not tell them apart."""
_MODIFIERS = ("fullwidth", "halfwidth")


def sample_metrics(made: Sequence[Continuation]) -> dict[str, float]:
    """Means over continuations, by name.

    length: tokens. end_of_turn_rate: share that ended by themselves, with half of its 95 % interval. repetition: share
    of a text's 4-grams of tokens that stood in it before. script_of_prompt: share whose letters are mostly of the
    script that the prompt's mostly are. script/NAME: share of all letters.
    """
    scripts = [scripts_of(one.text) for one in made]
    all_letters = sum(scripts, Counter[str]())
    same = [_most(found) == _most(scripts_of(one.prompt.text)) for one, found in zip(made, scripts, strict=True)]
    ended = _mean([one.ended for one in made])
    return {
        "length": _mean([one.tokens for one in made]),
        "end_of_turn_rate": ended,
        "end_of_turn_rate_interval": 1.96 * sqrt(ended * (1 - ended) / max(len(made), 1)),
        "repetition": _mean([repetition(one.ids) for one in made]),
        "script_of_prompt": _mean(same),
        **{f"script/{name}": count / all_letters.total() for name, count in sorted(all_letters.items())},
    }


def repetition(ids: Sequence[int]) -> float:
    """The share of 4-grams that stood before; 0 of fewer than two of them."""
    grams = [tuple(ids[n : n + _LENGTH]) for n in range(len(ids) - _LENGTH + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def scripts_of(text: str) -> Counter[str]:
    """How many letters of each script there are in `text`, by the first word of their Unicode names."""
    found: Counter[str] = Counter()
    for character in text:
        if unicodedata.category(character)[0] == "L":
            words = unicodedata.name(character, "unnamed").lower().split()
            name = words[1] if words[0] in _MODIFIERS and len(words) > 1 else words[0]
            found[_ONE_SCRIPT.get(name, name)] += 1
    return found


def _most(scripts: Counter[str]) -> str:
    return max(scripts, key=lambda name: (scripts[name], name), default="")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
