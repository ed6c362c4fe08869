"""Merges unigram models of several languages into one, so many pieces of each: the union, with probabilities of a mix.

Probabilities of different models are comparable once each is weighted by the share of its language in the mix:
p(x) = sum over models k of share_k * p_k(x), so that a piece of several models gets the sum.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_ext.data.tokenizer.model_file import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Model,
    Piece,
    by_score,
)
from megatron_ext.data.tokenizer.pieces import BATCH, count_tokens, sentencepiece_of
from megatron_ext.data.tokenizer.sample import Sample
from megatron_ext.errors import DataError

_ROUNDS = 2
"""Of re-estimation: further ones change nothing that matters."""
_MOST = 2.0
"""Sum of a model's probabilities: .91 to .97 in those of real text, some more where rare characters are many."""
_LEAST = 1e-38
"""Probability: what is less is nothing in single precision."""


@dataclass(frozen=True)
class Part:
    """One language of a merged model."""

    name: str
    model: Model
    quota: int
    """Normal pieces that it brings."""
    text: Sample
    """Lines of its language in the mix."""

    @property
    def tokens(self) -> float:
        """Tokens of the whole text, in pieces of this model."""
        counted = count_tokens(sentencepiece_of(self.model.to_bytes(), self.name), self.text.texts)
        return counted * self.text.weight


@dataclass(frozen=True)
class Merged:
    """A merged model and where its pieces are from."""

    model: Model
    brought: dict[str, int]
    """Normal pieces that each part brought, which no part before it had brought."""
    shares: dict[str, float]
    """Of the tokens of the mix."""


def merge_models(parts: Sequence[Part], scores: Literal["mixture", "em"] = "mixture") -> Merged:
    """Merge the models of `parts`.

    Special and byte pieces stand once and first, in the order of the first model; user-defined symbols are those of
    all. Then come the normal pieces: of each part in turn the likeliest that are not there yet, until it has brought
    as many as its quota says, and every single character of every model beyond that, or rare ones would fall to bytes.

    Args:
        scores: `mixture` of the models' probabilities, or `em`: counted anew on the mix, twice, each time as the model
            so far cuts it (hard expectation maximization).

    Raises:
        DataError: the models do not fit together, or have too few pieces; it names them.
    """
    check_compatible(parts)
    chosen, brought = _choose(parts)
    tokens = {part.name: part.tokens for part in parts}
    if not sum(tokens.values()):
        raise DataError("the texts are empty: there is no mix to weigh the models by")
    shares = {name: count / sum(tokens.values()) for name, count in tokens.items()}
    probabilities = _mixture(parts, shares)
    normal = [Piece(text, math.log(max(probabilities[text], _LEAST)), NORMAL) for text in chosen]
    model = parts[0].model.with_pieces([*_fixed(parts), *by_score(normal), *_unused(parts, chosen)])
    for _ in range(_ROUNDS if scores == "em" else 0):
        model = _counted_anew(model, parts)
    return Merged(model, brought, shares)


def without_spaces(model: Model) -> Model:
    """`model` whose normal pieces have lost the spaces in front that pre-segmented training text gave them.

    Pieces that are equal then are one, of both probabilities. Pieces of spaces alone stay.
    """
    sums: dict[str, float] = {}
    for piece in model.of(NORMAL):
        text = piece.text.lstrip(SPACE) or piece.text
        sums[text] = sums.get(text, 0.0) + math.exp(piece.score)
    normal = by_score(Piece(text, math.log(probability), NORMAL) for text, probability in sums.items())
    return model.with_pieces([*(piece for piece in model.pieces if piece.type != NORMAL), *normal])


def check_compatible(parts: Sequence[Part]) -> None:
    """Raise DataError where the models are no unigram models, or read text in different ways."""
    first = parts[0]
    for part in parts:
        if not part.model.is_unigram:
            raise DataError(f"{part.name}: is no unigram model: its scores are no probabilities, and cannot be merged")
        if (total := math.fsum(math.exp(min(piece.score, 1.0)) for piece in part.model.of(NORMAL))) > _MOST:
            raise DataError(
                f"{part.name}: its scores are no log-probabilities: probabilities of them sum to {total:.3g}"
            )
        rule = part.model.proto.normalizer_spec
        if rule.precompiled_charsmap:
            raise DataError(
                f"{part.name}: normalises text ({rule.name or 'by a rule of its own'}): models that are merged keep it "
                "as it is (normalization_rule_name=identity)"
            )
        for what, ours, theirs in zip(_RULES, _rules(first.model), _rules(part.model), strict=True):
            if ours != theirs:
                raise DataError(f"{what} is {ours} in {first.name}, {theirs} in {part.name}: they cannot be merged")
    types: dict[str, tuple[str, int]] = {}
    for part in parts:
        for piece in part.model.pieces:
            name, known = types.setdefault(piece.text, (part.name, piece.type))
            if known != piece.type and {known, piece.type} != {NORMAL, UNUSED}:
                raise DataError(
                    f"the piece {piece.text!r} is {_TYPE[known]} in {name}, {_TYPE[piece.type]} in {part.name}: train "
                    "both with the same user-defined symbols"
                )


_TYPE = {
    NORMAL: "normal",
    UNKNOWN: "the unknown piece",
    CONTROL: "a control piece",
    USER_DEFINED: "user-defined",
    BYTE: "a byte",
    UNUSED: "unused",
}
_RULES = (
    *("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces", "treat_whitespace_as_suffix"),
    *("the number of byte pieces", "the list of special pieces"),
)


def _rules(model: Model) -> tuple[object, ...]:
    normalizer, trainer = model.proto.normalizer_spec, model.proto.trainer_spec
    return (
        normalizer.add_dummy_prefix,
        normalizer.remove_extra_whitespaces,
        normalizer.escape_whitespaces,
        trainer.treat_whitespace_as_suffix,
        len(model.of(BYTE)),
        [piece.text for piece in model.of(UNKNOWN, CONTROL)],
    )


def _fixed(parts: Sequence[Part]) -> list[Piece]:
    """Special pieces, user-defined symbols of all parts, byte pieces."""
    first = parts[0].model
    symbols = {piece.text: piece for part in parts for piece in part.model.of(USER_DEFINED)}
    return [*first.of(UNKNOWN, CONTROL), *symbols.values(), *first.of(BYTE)]


def _unused(parts: Sequence[Part], chosen: set[str]) -> list[Piece]:
    unused = {piece.text: piece for part in parts for piece in part.model.of(UNUSED)}
    return [piece for text, piece in sorted(unused.items()) if text not in chosen]


def _choose(parts: Sequence[Part]) -> tuple[set[str], dict[str, int]]:
    """The normal pieces of the merged model, and how many each part brought."""
    chosen: set[str] = set()
    brought: dict[str, int] = {}
    faults = []
    for part in parts:
        ranked = by_score(part.model.of(NORMAL))
        new = [piece.text for piece in ranked if piece.text not in chosen]
        if len(new) < part.quota:
            faults.append(
                f"{part.name}: has {len(new)} pieces that the models before it have not brought, {part.quota} are "
                f"wanted; train a larger model, or set its quota to {len(new)}"
            )
        single = [text for text in new if len(text) == 1]
        room = max(part.quota - len(single), 0)
        taken = {*single, *itertools.islice((text for text in new if len(text) > 1), room)}
        chosen |= taken
        brought[part.name] = len(taken)
    if faults:
        raise DataError("\n".join(faults))
    return chosen, brought


def _mixture(parts: Sequence[Part], shares: dict[str, float]) -> Mapping[str, float]:
    """Probability of every normal piece of any part."""
    probabilities: defaultdict[str, float] = defaultdict(float)
    for part in parts:
        for piece in part.model.of(NORMAL):
            probabilities[piece.text] += shares[part.name] * math.exp(piece.score)
    return probabilities


def _counted_anew(model: Model, parts: Sequence[Part]) -> Model:
    """The same pieces, with scores from how often `model` itself uses each in the mix."""
    pieces = sentencepiece_of(model.to_bytes(), "the merged model")
    counts: dict[int, float] = {}
    for part in parts:
        counted: Counter[int] = Counter()  # of the sample
        for start in range(0, len(part.text.texts), BATCH):
            for ids in pieces.encode(part.text.texts[start : start + BATCH]):
                counted.update(ids)
        for number, occurrences in counted.items():
            counts[number] = counts.get(number, 0.0) + occurrences * part.text.weight
    normal = [(number, piece) for number, piece in enumerate(model.pieces) if piece.type == NORMAL]
    # Half an occurrence more for each, so that one that is never used keeps a score.
    total = math.fsum(counts.get(number, 0.0) + 0.5 for number, _ in normal)
    scored = [replace(piece, score=math.log((counts.get(number, 0.0) + 0.5) / total)) for number, piece in normal]
    before = [piece for piece in model.pieces if piece.type not in (NORMAL, UNUSED)]
    return model.with_pieces([*before, *by_score(scored), *model.of(UNUSED)])
