"""How long the documents of prepared datasets are: percentiles, a histogram by powers of two, a plot."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_ext.data.inspect.documents import Documents, prefix_of
from megatron_ext.data.inspect.options import LengthsOptions
from megatron_ext.data.inspect.plot import check_plot, new_axes, save
from megatron_ext.data.stream.packing import best_fit, cut_in_samples

_PERCENTILES = (0, 1, 10, 50, 90, 99, 100)
_BAR = 40


def show_lengths(o: LengthsOptions) -> Iterator[str]:
    """Lines for people: of each dataset percentiles and a histogram.

    Raises:
        DataError: a dataset is missing or damaged.
        ConfigError: no such kind of image.
    """
    check_plot(o.plot)
    found = {prefix: np.asarray(Documents(prefix).lengths) for prefix in map(prefix_of, o.prefixes)}
    for prefix, lengths in found.items():
        yield from _described(prefix, lengths, o.sequence_length)
    if o.plot is not None:
        _draw(found, o)
        yield f"plot: {o.plot}"


def histogram(lengths: np.ndarray[Any, Any]) -> list[tuple[int, int, int]]:
    """(least length, documents, tokens) of every power of two between the shortest and the longest document."""
    exponents = np.frexp(np.maximum(lengths, 1).astype(np.float64))[1] - 1
    documents = np.bincount(exponents)
    tokens = np.bincount(exponents, weights=lengths)
    return [(2**n, int(documents[n]), int(tokens[n])) for n in range(int(exponents.min()), len(documents))]


def _described(prefix: str, lengths: np.ndarray[Any, Any], sequence_length: int | None) -> Iterator[str]:
    total = int(lengths.sum(dtype=np.int64))
    yield f"{prefix}: {len(lengths):,} documents, {total:,} tokens, {total / len(lengths):,.1f} each on average"
    points = zip(_PERCENTILES, np.percentile(lengths, _PERCENTILES, method="lower"), strict=True)
    yield "  percentiles  " + "  ".join(f"{share}%: {value:,}" for share, value in points)
    rows = histogram(lengths)
    most = max(tokens for _, _, tokens in rows)
    yield f"  {'tokens':>23}  {'documents':>12}  {'of tokens':>9}"
    for least, documents, tokens in rows:
        bar = "#" * round(_BAR * tokens / most)
        yield f"  {least:>10,} to {2 * least - 1:>9,}  {documents:>12,}  {tokens / total:>9.2%}  {bar}"
    if sequence_length is not None:
        longer = lengths[lengths > sequence_length]
        share = int(longer.sum(dtype=np.int64)) / total
        yield (
            f"  longer than {sequence_length:,}: {len(longer):,} documents ({len(longer) / len(lengths):.2%}), "
            f"with {share:.2%} of the tokens"
        )
        parts = cut_in_samples(lengths, sequence_length)
        yield (
            f"  one after the other in samples of {sequence_length:,}: {parts:,} documents are cut "
            f"({parts / len(lengths):.2%})"
        )
        yield f"  with data.pack_documents: {best_fit(lengths, sequence_length).saved()}"


def _draw(found: dict[str, np.ndarray[Any, Any]], o: LengthsOptions) -> None:
    assert o.plot is not None
    axes = new_axes("document length (tokens)", "share of the dataset's tokens")
    for prefix, lengths in found.items():
        rows = histogram(lengths)
        total = sum(tokens for _, _, tokens in rows)
        edges = [least for least, _, _ in rows] + [2 * rows[-1][0]]
        axes.stairs([tokens / total for _, _, tokens in rows], edges, label=prefix)
    if o.sequence_length is not None:
        axes.axvline(o.sequence_length, color="grey", linestyle="--", label=f"sequence length {o.sequence_length:,}")
    axes.set_xscale("log", base=2)
    save(axes, o.plot)
