"""What prepared datasets are made of: their shares of the tokens, and the scripts their documents are written in.

A script is no language: Latin may be English or Vietnamese. It needs no model, and shows at once what is missing.
"""

import functools
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from megatron_ext.data.dataset import check_dataset
from megatron_ext.data.inspect.documents import Documents, prefix_of, text_of
from megatron_ext.data.inspect.options import MixOptions
from megatron_ext.data.inspect.plot import check_plot, new_axes, save
from megatron_ext.data.tokenizer import Tokenizer

NO_LETTERS = "no letters"
_KANA, _HAN, _JAPANESE = "Kana", "Han", "Han and Kana (Japanese)"
_NAMES = {"Cjk": _HAN, "Hiragana": _KANA, "Katakana": _KANA, "Katakana-Hiragana": _KANA}
_WIDTHS = ("FULLWIDTH", "HALFWIDTH", "COMBINING", "MODIFIER")


@dataclass(frozen=True)
class DatasetMix:
    """One dataset, by a sample of its documents."""

    documents: int
    tokens: int
    """Of the whole dataset."""
    read: int
    """Documents of the sample."""
    characters_a_token: float
    scripts: Mapping[str, float]
    """The main script of a document, and the share of the sample's tokens in such documents; most first."""


def show_mix(o: MixOptions) -> Iterator[str]:
    """Lines for people: the share of each dataset in all tokens, and of each script in it.

    Raises:
        DataError: a dataset is missing, damaged or of another tokenizer.
        ConfigError: no such kind of image.
    """
    check_plot(o.plot)
    tokenizer = Tokenizer(o.tokenizer)
    prefixes = [prefix_of(name) for name in o.prefixes]
    for prefix in prefixes:
        check_dataset(prefix, tokenizer)
    found = {prefix: read_mix(prefix, tokenizer, o.documents) for prefix in prefixes}
    total = sum(mix.tokens for mix in found.values())
    yield "By script (Unicode names of letters), not by language: Latin may be English as well as Vietnamese, or code."
    for prefix, mix in found.items():
        yield (
            f"\n{prefix}: {mix.tokens:,} tokens ({mix.tokens / total:.2%} of all), {mix.documents:,} documents; "
            f"{mix.characters_a_token:.3g} characters a token in {mix.read:,} documents read"
        )
        for script, share in mix.scripts.items():
            yield f"  {share:>8.2%}  {script}"
    if len(found) > 1:
        yield "\nall together, by tokens"
        for script, share in together(found).items():
            yield f"  {share:>8.2%}  {script}"
    if o.plot is not None:
        _draw(found, o.plot)
        yield f"plot: {o.plot}"


def read_mix(prefix: str, tokenizer: Tokenizer, most: int) -> DatasetMix:
    """Read at most `most` documents, evenly spaced over the dataset at `prefix`."""
    documents = Documents(prefix)
    count = min(most, len(documents))
    tokens: Counter[str] = Counter()
    characters = 0
    for number in np.linspace(0, len(documents) - 1, count).round().astype(int):
        ids = documents[int(number)].tolist()
        text = text_of(ids, tokenizer).removesuffix(tokenizer.eod_token)
        tokens[script_of(text)] += len(ids)
        characters += len(text)
    read = tokens.total()
    shares = {script: many / read for script, many in tokens.most_common()}
    return DatasetMix(len(documents), documents.num_tokens, count, characters / read, shares)


def together(found: Mapping[str, DatasetMix]) -> dict[str, float]:
    """The share of each script in the tokens of all datasets; most first."""
    total = sum(mix.tokens for mix in found.values())
    shares: Counter[str] = Counter()
    for mix in found.values():
        for script, share in mix.scripts.items():
            shares[script] += share * mix.tokens / total  # type: ignore[assignment]
    return dict(shares.most_common())


def script_of(text: str) -> str:
    """The script that most letters of `text` are of; Japanese is told from Chinese by its Kana."""
    letters: Counter[str] = Counter()
    for character, many in Counter(text).items():
        letters[_script(character)] += many
    letters.pop("", None)
    if letters[_KANA]:
        letters[_JAPANESE] = letters.pop(_KANA) + letters.pop(_HAN, 0)
    return letters.most_common(1)[0][0] if letters.total() else NO_LETTERS


@functools.cache
def _script(character: str) -> str:
    """The script of a letter or its mark, by its Unicode name; empty for all else."""
    if unicodedata.category(character)[0] not in "LM":
        return ""
    words = unicodedata.name(character, "").split()
    while words and words[0] in _WIDTHS:
        words = words[1:]
    name = words[0].title() if words else ""
    return _NAMES.get(name, name)


def _draw(found: Mapping[str, DatasetMix], path: str) -> None:
    axes = new_axes("share of the tokens, by the main script of the document", "")
    places, left = np.arange(len(found)), np.zeros(len(found))
    for script in together(found):
        shares = np.array([mix.scripts.get(script, 0.0) for mix in found.values()])
        axes.barh(places, shares, left=left, label=script)
        left += shares
    axes.set_yticks(places, [f"{prefix} ({mix.tokens:,})" for prefix, mix in found.items()])
    axes.invert_yaxis()
    save(axes, path)
