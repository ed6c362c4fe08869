"""Proper nouns that a unigram model must have as whole pieces, with the probability that the text gives them."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers

from megatron_ext.data.tokenizer.model_file import NORMAL, SPACE, USER_DEFINED, Model, Piece, by_score
from megatron_ext.data.tokenizer.pieces import count_tokens, sentencepiece_of
from megatron_ext.errors import DataError
from megatron_ext.foreign import reading


def read_names(path: str | Path) -> list[str]:
    """The names in a text file, one a line; empty lines and repetitions are left out.

    Raises:
        DataError: it cannot be read, or has none.
    """
    with reading(path, DataError, kind="text"):
        text = Path(path).read_text(encoding="utf-8-sig")
    names = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not names:
        raise DataError(f"{path}: has no names; expected one a line")
    return names


def names_in(names: Sequence[str], texts: Iterable[str]) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """The `texts` that have any of `names`, each with the places (start, stop) of those that stand in it.

    Of names that overlap the first counts, of those that begin together the longest.
    """
    finder = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token=""))
    finder.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in names])
    known = frozenset(names)
    for text in texts:
        found = finder.encode(text, add_special_tokens=False)
        if spans := [place for token, place in zip(found.tokens, found.offsets, strict=True) if token in known]:
            yield text, spans


def count_names(names: Sequence[str], lines: Iterable[str]) -> Counter[str]:
    """How often each name stands in `lines`, spelt as a piece: those after a space are counted apart, as `▁name`."""
    counts: Counter[str] = Counter()
    for line, spans in names_in(names, lines):
        counts.update(SPACE * (line[start - 1 : start] == " ") + _piece(line[start:stop]) for start, stop in spans)
    return counts


def with_names(model: Model, names: Sequence[str], lines: Sequence[str]) -> Model:
    """`model` with every name as a normal piece, in place of its least likely ones: its size stays.

    A name has the score ln(its count in `lines` / tokens of `lines`), at least that of one occurrence. One that stands
    after spaces is a piece with the space as well. It competes with other pieces by its probability: 京都 is not cut
    out of 東京都, as a user-defined symbol would be.

    Raises:
        DataError: the model is not unigram, a name cannot be a piece, or the names are more than the vocabulary.
    """
    if not model.is_unigram:
        raise DataError("names need a unigram model: pieces of others have no probability")
    _check_names(names, model)
    counts = count_names(names, lines)
    total = count_tokens(sentencepiece_of(model.to_bytes(), "the model"), lines)
    present = {piece.text for piece in model.pieces}
    wanted = [text for name in names for text in _spellings(name, counts) if text not in present]
    added = [Piece(text, math.log(max(counts[text], 1) / max(total, 1)), NORMAL) for text in dict.fromkeys(wanted)]
    keep = {text for name in names for text in (_piece(name), SPACE + _piece(name))}
    droppable = [one for one in by_score(model.of(NORMAL)) if len(one.text) > 1 and one.text not in keep]
    if len(added) > len(droppable):
        raise DataError(f"{len(added)} names are no pieces yet, but only {len(droppable)} pieces can make room")
    dropped = {piece.text for piece in droppable[len(droppable) - len(added) :]}
    fixed = [piece for piece in model.pieces if piece.type != NORMAL]
    normal = by_score([*(piece for piece in model.of(NORMAL) if piece.text not in dropped), *added])
    return model.with_pieces([*fixed, *normal])


def _spellings(name: str, counts: Counter[str]) -> list[str]:
    """The pieces of a name: as it is, unless it stands after spaces only, and with the space where it does."""
    alone, after_space = _piece(name), SPACE + _piece(name)
    return [text for text in (alone, after_space) if counts[text]] or [alone]


def _piece(text: str) -> str:
    return text.replace(" ", SPACE)


def _check_names(names: Sequence[str], model: Model) -> None:
    symbols = [piece.text for piece in model.of(USER_DEFINED)]
    present = {piece.text: piece.type for piece in model.pieces}
    for name in names:
        if any(symbol in name for symbol in symbols):
            raise DataError(f"the name {name!r} holds a user-defined symbol, which is cut out of it; leave one out")
        if present.get(_piece(name), NORMAL) != NORMAL:
            raise DataError(f"the name {name!r} is a special piece of the model; leave it out")
