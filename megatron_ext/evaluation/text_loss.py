"""The loss of a model on texts, document by document: perplexity, bits per byte, and how sure both are."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.data.prepare.corpus import corpus_files
from megatron_ext.data.prepare.documents import read_documents
from megatron_ext.data.tokenizer.reading import end_of_document
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.generation.text_model import TextModel

log = logging.getLogger(__name__)

CERTAIN = 1.96
"""Standard errors on either side of an interval of 95 %."""
_USUAL_WINDOW = 2048


@dataclass(frozen=True)
class Windows:
    """How a document longer than what a model sees at once is cut."""

    size: int
    """Tokens that the model sees at once, with the one before the document."""
    stride: int
    """Tokens by which the next window is further on: each token is predicted once, from at least size - stride tokens
    before it, as far as there are so many."""

    def of(self, tokens: int) -> Iterator[tuple[int, int, int]]:
        """Begin, end, and how many tokens at the end are predicted anew, of each window of so many tokens."""
        begin, predicted = 0, 1  # nothing predicts the first one
        while predicted < tokens:
            end = min(begin + self.size, tokens)
            yield begin, end, end - predicted
            predicted, begin = end, begin + self.stride


def windows_of(model: TextModel, size: int | None, stride: int | None) -> Windows:
    """The windows asked for; default: as much as the model has been made for, up to 2,048 tokens, by half of it.

    Raises:
        ConfigError: they are longer than learned positions, or some tokens would be in none.
    """
    made_for = getattr(model.network.config, "max_position_embeddings", None)
    size = min(int(made_for or _USUAL_WINDOW), _USUAL_WINDOW) if size is None else size
    stride = max(size // 2, 1) if stride is None else stride
    if model.positions is not None and size > model.positions:
        raise ConfigError(f"window = {size}: {model.name} has learned {model.positions} positions only")
    if size < 2 or not 1 <= stride < size:
        raise ConfigError(f"window = {size}, stride = {stride}: the stride must be at least 1 and below the window")
    if made_for is not None and size > made_for:
        log.warning(
            "window = %s: %s was made for %s positions, so that the loss of longer documents also says how it does "
            "beyond them; --window %s leaves that out",
            *(size, model.name, made_for, made_for),
        )
    return Windows(size, stride)


@dataclass
class TextLoss:
    """Of a model on texts; a number for each document."""

    nats: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    """Of UTF-8."""

    @property
    def loss(self) -> float:
        """Nats a token."""
        return sum(self.nats) / max(sum(self.tokens), 1)

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """The same for any tokenizer."""
        return sum(self.nats) / math.log(2) / max(sum(self.bytes), 1)

    @property
    def bits_interval(self) -> float:
        """Half of the 95 % interval of bits per byte: documents vary, as drawn from many."""
        return half_interval([nats / math.log(2) for nats in self.nats], self.bytes)

    def record(self) -> dict[str, float | None]:
        """All figures by name; no interval where there is one document only."""
        interval = None if math.isnan(self.bits_interval) else self.bits_interval
        figures = {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        counts = {"documents": len(self.nats), "tokens": sum(self.tokens), "bytes": sum(self.bytes)}
        return {**figures, "bits_per_byte_interval": interval, **counts}


def half_interval(amounts: Sequence[float], sizes: Sequence[float]) -> float:
    """Half of the 95 % interval of sum(amounts) / sum(sizes) over documents (ratio estimator); NaN of fewer than two.

    Source: Cochran, Sampling Techniques, 3rd edition, section 6.4.
    """
    count, total = len(amounts), sum(sizes)
    if count < 2 or total == 0:
        return math.nan
    ratio = sum(amounts) / total
    squares = sum((amount - ratio * size) ** 2 for amount, size in zip(amounts, sizes, strict=True))
    return CERTAIN * math.sqrt(squares * count / (count - 1)) / total


def read_texts(path: str | Path, most: int | None, text_key: str = "text") -> Iterator[str]:
    """The documents of a file or folder that have any text, the first `most` of them, one at a time.

    The first is read at once, so that a path without any is an error here.

    Raises:
        DataError: there is none, or one cannot be read.
    """
    texts = (text for text in read_documents(corpus_files([path]), text_key) if text.strip())
    first = next(texts, None)
    if first is None:
        raise DataError(f"{path}: holds no text")
    return chain([first], texts if most is None else islice(texts, max(most - 1, 0)))


def text_loss(model: TextModel, texts: Iterable[str], windows: Windows, *, batch_size: int = 8) -> TextLoss:
    """The loss of `model` on every token of `texts`, each a document of its own, in fp32.

    What stands before a document is what the model was trained with: the beginning-of-text token where the tokenizer
    writes one, else the token that ends the document before.

    Raises:
        DataError: the tokenizer has neither, or makes tokens that the model has no row for.
    """
    found, start = TextLoss(), _start(model)
    rows: list[tuple[int, list[int], int]] = []
    for text in texts:
        ids = [start, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]
        if (largest := max(ids)) >= model.rows:
            raise DataError(
                f"{model.name}: its tokenizer makes token {largest}, but it embeds {model.rows} tokens only"
            )
        document = len(found.nats)
        found.nats.append(0.0)
        found.tokens.append(len(ids) - 1)
        found.bytes.append(len(text.encode(errors="surrogatepass")))
        for begin, end, count in windows.of(len(ids)):
            rows.append((document, ids[begin:end], count))
            if len(rows) == batch_size:
                _add(model, rows, found)
                rows = []
    if rows:
        _add(model, rows, found)
    return found


@torch.no_grad()
def _add(model: TextModel, rows: Sequence[tuple[int, list[int], int]], found: TextLoss) -> None:
    """Add to each row's document the loss of its last tokens."""
    longest = max(len(ids) for _, ids, _ in rows)
    # Padding on the right: no token sees what comes behind it.
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids, _ in rows], device=model.network.device)
    logits = model.network(tokens, use_cache=False).logits
    for row, (document, ids, count) in enumerate(rows):
        end = len(ids)
        found.nats[document] += float(_nats(logits[row, end - 1 - count : end - 1], tokens[row, end - count : end]))


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").double().sum()


def _start(model: TextModel) -> int:
    tokenizer = model.tokenizer
    if tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return int(tokenizer.bos_token_id)
    return end_of_document(model.directory, tokenizer)[0]
