"""Token batches for comparing two models: from text, from a prepared dataset, or from a few sentences of our own."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_ext.checkpoint.tokenizer_files import has_tokenizer
from megatron_ext.data.dataset import check_dataset
from megatron_ext.data.indexed import token_dtype
from megatron_ext.data.prepare.corpus import corpus_files
from megatron_ext.data.prepare.documents import read_documents
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import DataError
from megatron_ext.model_io.checkpoint_model import tokenizer_directory
from megatron_ext.model_io.open import is_hugging_face, read_any_model

_SENTENCES = (
    "The committee met on Thursday and, after a long discussion, decided to postpone the decision until March.",
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "सूरज पूरब में उगता है और पश्चिम में डूबता है; यह बात हर बच्चा जानता है।",
    "def add(values):\n    total = 0\n    for value in values:\n        total += value\n    return total\n",
    "3.14159 is the ratio of a circle's circumference to its diameter, to five decimal places.",
)


def token_batches(
    source: str | Path | None, tokenizer: Tokenizer, *, batches: int, rows: int, length: int
) -> list[Tensor]:
    """Return up to `batches` batches of token ids [rows, length].

    Args:
        source: a corpus (a file or a folder), the prefix of a prepared dataset, or None for built-in sentences.

    Raises:
        DataError: too little text for one batch, or a dataset that is damaged or of another tokenizer.
    """
    needed = rows * length
    stream = _tokens(source, tokenizer, most=batches * needed)
    result: list[Tensor] = []
    buffer: list[int] = []
    for ids in stream:
        buffer.extend(ids)
        while len(buffer) >= needed and len(result) < batches:
            result.append(torch.tensor(buffer[:needed]).view(rows, length))
            buffer = buffer[needed:]
        if len(result) == batches:
            break
    if not result:
        raise DataError(f"{source or 'the built-in text'}: fewer than {needed} tokens, one batch of {rows} x {length}")
    return result


def _tokens(source: str | Path | None, tokenizer: Tokenizer, *, most: int) -> Iterator[Iterable[int]]:
    """Token ids of `source` piece by piece; of a prepared dataset no more than `most` are read."""
    if source is None:
        ids = tokenizer.encode("\n".join(_SENTENCES))
        while ids:  # a vocabulary may have none of it
            yield ids
    elif Path(f"{source}.bin").is_file():
        check_dataset(source, tokenizer)
        yield np.fromfile(f"{source}.bin", dtype=token_dtype(tokenizer.vocab_size), count=most).tolist()
    else:
        for document in read_documents(corpus_files([source])):
            yield [*tokenizer.encode(document), tokenizer.eod]


def comparison_batches(
    checkpoint: str | Path,
    source: str | Path | None,
    tokenizer: str | Path | None,
    *,
    batches: int = 4,
    rows: int = 2,
    length: int = 128,
) -> list[Tensor]:
    """Token batches for comparing `checkpoint` with another model.

    The tokenizer is the one given, the one inside a Hugging Face directory or the one of the training run. Where there
    is none, and no text was asked for, token ids are random. Rows are no longer than learned positions reach.
    """
    model = read_any_model(checkpoint)
    if model.position_embedding_type == "learned_absolute":
        length = min(length, model.max_position_embeddings)
    directory = Path(tokenizer) if tokenizer is not None else _own_tokenizer(checkpoint)
    if directory is not None:
        reader = Tokenizer(directory)
        result = token_batches(source, reader, batches=batches, rows=rows, length=length)
        if (largest := max(int(tokens.max()) for tokens in result)) >= model.vocab_size:
            raise DataError(f"{directory}: makes token {largest}, but {checkpoint} has {model.vocab_size} tokens only")
        return result
    if source is not None:
        raise DataError(f"{checkpoint} has no tokenizer to read {source} with; pass --tokenizer DIR")
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, model.vocab_size, (rows, length), generator=generator) for _ in range(batches)]


def _own_tokenizer(checkpoint: str | Path) -> Path | None:
    if not is_hugging_face(checkpoint):
        return tokenizer_directory(checkpoint)
    return Path(checkpoint) if has_tokenizer(Path(checkpoint)) else None
