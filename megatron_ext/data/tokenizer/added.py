"""Adds tokens to a Hugging Face tokenizer, behind those that it has."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.checkpoint.tokenizer_files import ADDED_FILE, copy_tokenizer
from megatron_ext.data.tokenizer.load import load_tokenizer
from megatron_ext.data.tokenizer.pieces import is_text
from megatron_ext.data.tokenizer.probe import HARD_TEXTS
from megatron_ext.data.tokenizer.reading import Tokenizer
from megatron_ext.errors import DataError


@dataclass(frozen=True)
class Added:
    """What was added to a tokenizer."""

    ids: dict[str, int]
    """Of the new tokens."""
    pieces: dict[int, list[int]]
    """What the tokenizer before made of the text of each, by the new id."""
    vocab_size: int
    """The largest id of the new tokenizer and one more."""


def write_extended(directory: Path, target: Path, tokens: Sequence[str], *, special: bool) -> Added:
    """Write the tokenizer of `directory` with `tokens` besides into the folder `target`, and prove it there.

    Args:
        special: they are control tokens, which no text is read as.

    Raises:
        DataError: a token is there already, or cannot be added; or another text would be read otherwise.
    """
    before = Tokenizer(directory)
    _check_tokens(tokens, before)
    pieces = [before.encode(token) for token in tokens]
    from tokenizers import AddedToken

    loaded = load_tokenizer(directory)
    new = [AddedToken(token, normalized=False, special=special) for token in tokens]
    loaded.add_tokens(new, special_tokens=special)
    copy_tokenizer(directory, target)
    (target / ADDED_FILE).unlink(missing_ok=True)  # what is written now says it all
    loaded.save_pretrained(target)
    after = Tokenizer(target)
    ids = {token: after.vocabulary.get(token, -1) for token in tokens}
    _check(before, after, ids, special=special)
    return Added(ids, {ids[token]: of_it for token, of_it in zip(tokens, pieces, strict=True)}, after.vocab_size)


def _check_tokens(tokens: Sequence[str], before: Tokenizer) -> None:
    if not tokens:
        raise DataError("there are no tokens to add")
    seen: set[str] = set()
    for token in tokens:
        if not token.strip() or not is_text(token):
            raise DataError(f"the token {token!r} is empty, white space or not UTF-8, and cannot be added")
        if token in before.vocabulary:
            number = before.vocabulary[token]
            raise DataError(f"{before.directory}: {token!r} is token {number} already; leave it out")
        if token in seen:
            raise DataError(f"the token {token!r} is named twice")
        seen.add(token)


def _check(before: Tokenizer, after: Tokenizer, ids: dict[str, int], *, special: bool) -> None:
    """Raise DataError where the new tokenizer is not the old one with the new tokens behind."""
    where = f"{before.directory}: cannot be extended"
    if sorted(ids.values()) != list(range(before.vocab_size, after.vocab_size)):
        raise DataError(f"{where}: the new ids would be {ids}, and not those from {before.vocab_size} on")
    old = {token: number for token, number in after.vocabulary.items() if token not in ids}
    if old != before.vocabulary or after.eod != before.eod:
        raise DataError(f"{where}: written again, its other tokens are not what they were")
    for text in (text for text in HARD_TEXTS if not any(token in text for token in ids)):
        if before.encode(text) != after.encode(text):
            raise DataError(f"{where}: written again, it reads {text[:40]!r} otherwise")
    for token, number in ids.items():
        if (number in after.encode(token)) == special:
            what = "as the token, though it is special" if special else "otherwise than as the token"
            raise DataError(f"{where}: it would read {token!r} {what}")
