"""Samples of prepared chat data as text, and what of each is trained on: in colour, or between brackets."""

from collections.abc import Iterator, Sequence

from megatron_ext.data.inspect.documents import prefix_of, shortened, text_of
from megatron_ext.data.inspect.options import RowsOptions
from megatron_ext.data.supervised import READ_BY, Supervised, check_supervised, kind_of_data
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import DataError

_TRAINED, _PLAIN = "\033[30;42m", "\033[0m"
OPENS, CLOSES = "⟦", "⟧"
"""Around what is trained on, where there is no colour."""


def show_rows(o: RowsOptions, *, coloured: bool) -> Iterator[str]:
    """Lines for people: samples with what is trained on marked; of pairs the chosen answer and then the rejected one.

    Args:
        coloured: the reader is a terminal.

    Raises:
        DataError: the dataset is missing, damaged, of another tokenizer, no chat data, or has no such sample.
    """
    prefix, tokenizer = prefix_of(o.prefix), Tokenizer(o.tokenizer)
    kind = kind_of_data(prefix)
    if kind == "text":
        raise DataError(f"{prefix}: documents of text, all of them trained on; see the command `documents`")
    size = check_supervised(prefix, tokenizer, kind)
    data = Supervised(prefix)
    share = size.supervised / size.tokens
    yield (
        f"{prefix}: {size.samples:,} samples for {READ_BY[kind]}, {size.tokens:,} tokens, {size.supervised:,} of them "
        f"trained on ({share:.1%}), longest {size.longest:,}"
    )
    if o.first >= len(data):
        raise DataError(f"{prefix}: there is no sample {o.first}; the last is {len(data) - 1}")
    for number in range(o.first, min(o.first + o.count, len(data))):
        ids, counts, weight = data.sample(number)
        name = f"pair {number // 2}, {'rejected' if number % 2 else 'chosen'}" if kind == "preference" else "sample"
        weighted = "" if weight == 1 else f", weight {weight:g}"
        yield f"\n{name} {number}: {len(ids):,} tokens, {int(counts.sum()):,} of them trained on{weighted}"
        yield shortened(marked(ids.tolist(), counts.tolist(), tokenizer, coloured=coloured), o.characters)


def marked(ids: Sequence[int], counts: Sequence[bool], tokenizer: Tokenizer, *, coloured: bool) -> str:
    """The text of a sample, control tokens as they are spelt, with marks around what is trained on.

    Raises:
        DataError: an id is none of the tokenizer's.
    """
    begin, end = (_TRAINED, _PLAIN) if coloured else (OPENS, CLOSES)
    text, stretch, inside = "", list[int](), False
    for token, counted in zip(ids, counts, strict=True):
        if counted != inside:
            text += text_of(stretch, tokenizer) + (begin if counted else end)
            stretch, inside = [], counted
        stretch.append(token)
    return text + text_of(stretch, tokenizer) + (end if inside else "")
