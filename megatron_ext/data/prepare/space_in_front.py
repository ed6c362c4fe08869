"""Tokenizers that put a space in front of a text, as those that do not: for the text that has the space already."""

import json
from collections.abc import Callable
from typing import Any

import tokenizers

from megatron_ext.data.prepare.running_scores import SPACES
from megatron_ext.data.prepare.segment_reading import MARKED_SPACES
from megatron_ext.data.prepare.text_cuts import steps_of
from megatron_ext.data.tokenizer import Tokenizer

_SPACE, _MARK = SPACES


def without_space_in_front(tokenizer: Tokenizer) -> tuple[Tokenizer, Callable[[str], str]] | None:
    """The tokenizer that puts none there, and what a text is for it; None where there is no such thing.

    That is also where tokens are cut out of a text: a space is put in front of what stands behind each.
    """
    if tokenizer.fast is None:
        return None
    content = json.loads(tokenizer.fast.to_str())
    if not all(token["special"] for token in content["added_tokens"]):
        return None
    front = _taken_from(content)
    if front is None:
        return None
    return tokenizer.with_backend(tokenizers.Tokenizer.from_str(json.dumps(content))), front


def _taken_from(content: dict[str, Any]) -> Callable[[str], str] | None:
    """Take the step that puts the space out of `content`; what it does to a text."""
    normalizers = steps_of(content["normalizer"], "normalizers")
    splits = steps_of(content["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in (*normalizers, *splits)]
    if kinds == ["Metaspace"] and splits[0]["replacement"] == _MARK and splits[0]["prepend_scheme"] != "never":
        content["pre_tokenizer"] = {**splits[0], "prepend_scheme": "never"}
        return lambda text: text if text.startswith(SPACES) else _SPACE + text
    if kinds == ["Prepend", "Replace"] and normalizers[0]["prepend"] == _MARK and normalizers[1] == MARKED_SPACES:
        content["normalizer"], content["pre_tokenizer"] = MARKED_SPACES, None
        return lambda text: _SPACE + text
    return None
