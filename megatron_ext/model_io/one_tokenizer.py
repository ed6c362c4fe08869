"""Models that are mixed must mean the same tokens by the rows of their embeddings."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.tokenizer_files import VOCABULARIES, tokenizer_files
from megatron_ext.data.tokenizer.load import load_tokenizer
from megatron_ext.data.tokenizer.probe import HARD_TEXTS
from megatron_ext.data.tokenizer.reading import rules_of
from megatron_ext.errors import ConversionError, DataError
from megatron_ext.model_io.open import Checkpoint

log = logging.getLogger(__name__)


def require_one_tokenizer(checkpoints: Sequence[Checkpoint]) -> None:
    """Check that those models that carry a tokenizer carry the same one.

    The token that ends a text may differ, as between a base model and a chat model made of it, and one may have tokens
    at the end that another lacks: the rows that they share mean the same.

    Raises:
        ConversionError: two do not; it names both, and a token or text that they read differently.
    """
    known = [one for one in checkpoints if _vocabularies(one.companion_files)]
    for other in known[1:]:
        first = known[0]
        if _same_files(first.companion_files, other.companion_files):
            continue
        try:
            difference = _difference(load_tokenizer(first.companion_files), load_tokenizer(other.companion_files))
        except DataError as error:
            log.warning("tokenizers of %s and %s are not compared: %s", first.directory, other.directory, error)
            continue
        if difference is not None:
            raise ConversionError(
                f"{first.directory} and {other.directory} have different tokenizers: {difference}. Rows of "
                "their embeddings, or the texts they were trained on, mean different tokens; mix models of "
                "one tokenizer. If it is the same one and a file is wrong, put the files of the right one in its place"
            )


def _vocabularies(directory: Path) -> list[Path]:
    return [name for name in tokenizer_files(directory) if any(name.match(pattern) for pattern in VOCABULARIES)]


def _same_files(a: Path, b: Path) -> bool:
    """Whether the files that say which tokens there are are the same, as in checkpoints of one run."""
    ours, theirs = ([n for n in tokenizer_files(one) if n.suffix != ".jinja"] for one in (a, b))
    return ours == theirs and all((a / name).read_bytes() == (b / name).read_bytes() for name in ours)


def _difference(a: Any, b: Any) -> str | None:
    """What two tokenizers mean by the same id or text, where that differs."""
    ours, theirs = a.get_vocab(), b.get_vocab()
    named = {number: token for token, number in theirs.items()}
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        if number in named and named[number] != token:
            return f"token {number} is {token!r} in the first, {named[number]!r} in the second"
        if token in theirs and theirs[token] != number:
            return f"{token!r} is token {number} in the first, {theirs[token]} in the second"
    backends = [getattr(one, "backend_tokenizer", None) for one in (a, b)]
    if None not in backends and rules_of(backends[0]) != rules_of(backends[1]):
        return "the tokens are the same, but not the merges or scores by which text is cut into them"
    added = {token.content for one in (a, b) for token in one.added_tokens_decoder.values()}
    for text in (text for text in HARD_TEXTS if not any(token in text for token in added)):
        ids = [
            one(text, add_special_tokens=False, split_special_tokens=True, truncation=False, padding=False).input_ids
            for one in (a, b)
        ]
        if ids[0] != ids[1]:
            return f"{text[:30]!r} is {ids[0][:8]} in the first, {ids[1][:8]} in the second"
    return None
