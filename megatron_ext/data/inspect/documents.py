"""Documents of a prepared dataset, one by one, as tokens and as text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.data.dataset import PREPARE_AGAIN, check_dataset
from megatron_ext.data.indexed import read_index
from megatron_ext.data.inspect.options import DocumentsOptions
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import DataError


class Documents:
    """The documents of the dataset at `prefix`, mapped: opening it costs no more for many than for few.

    Raises:
        DataError: it is missing or damaged.
    """

    def __init__(self, prefix: str | Path) -> None:
        dtype, self.lengths = read_index(Path(f"{prefix}.idx"))
        self._ends = np.cumsum(self.lengths, dtype=np.int64)
        there = Path(f"{prefix}.bin").stat().st_size / dtype.itemsize
        if there != self.num_tokens:
            raise DataError(f"{prefix}.bin has {there:,g} tokens, its index says {self.num_tokens:,}; {PREPARE_AGAIN}")
        self._tokens = np.memmap(f"{prefix}.bin", dtype, "r")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> np.ndarray[Any, Any]:
        end = int(self._ends[number])
        return self._tokens[end - int(self.lengths[number]) : end]

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, with their ends."""
        return int(self._ends[-1])


def prefix_of(name: str) -> str:
    """The dataset that is meant by its name, or by one of its two files."""
    return name.removesuffix(".bin").removesuffix(".idx")


def show_documents(o: DocumentsOptions) -> Iterator[str]:
    """Lines for people: the documents that were asked for, each with its length and whether its end is marked.

    Raises:
        DataError: the dataset is missing, damaged, of another tokenizer, or has no such document.
    """
    prefix, tokenizer = prefix_of(o.prefix), Tokenizer(o.tokenizer)
    check_dataset(prefix, tokenizer)
    documents = Documents(prefix)
    yield f"{prefix}: {len(documents):,} documents, {documents.num_tokens:,} tokens"
    if o.first >= len(documents):
        raise DataError(f"{prefix}: there is no document {o.first}; the last is {len(documents) - 1}")
    for number in range(o.first, min(o.first + o.count, len(documents))):
        tokens = documents[number].tolist()
        end = "" if tokens and tokens[-1] == tokenizer.eod else ", its end is not marked"
        yield f"\ndocument {number}: {len(tokens):,} tokens{end}"
        yield shortened(text_of(tokens, tokenizer), o.characters)


def text_of(tokens: list[int], tokenizer: Tokenizer) -> str:
    """What the tokens say; an end of document is written as its token.

    Raises:
        DataError: an id is none of the tokenizer's.
    """
    if tokens and not 0 <= min(tokens) <= max(tokens) < tokenizer.vocab_size:
        raise DataError(
            f"token id {max(tokens)} is none of the {tokenizer.vocab_size} of {tokenizer.directory}; name the "
            "tokenizer that the data was prepared with"
        )
    texts, begin = [], 0
    for end in [n for n, token in enumerate(tokens) if token == tokenizer.eod] + [len(tokens)]:
        texts.append(tokenizer.decode(tokens[begin:end]))
        begin = end + 1
    return tokenizer.eod_token.join(texts)


def shortened(text: str, most: int) -> str:
    """At most `most` characters of `text`, and how many are left out."""
    return text if len(text) <= most else f"{text[:most]} [... {len(text) - most:,} more characters]"
