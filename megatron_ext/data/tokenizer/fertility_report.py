"""Tokenizers side by side: fertility of each language as a table and a plot, and what it means for a corpus."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.data.tokenizer.fertility import Fertility
from megatron_ext.files import write_bytes

Measured = Mapping[str, Mapping[str, Fertility]]
"""Of each tokenizer, by the name of the language."""


def fertility_lines(measured: Measured) -> list[str]:
    """A table of every language and tokenizer. Compare within a language: characters of two say different much."""
    with_names = any(one.names for languages in measured.values() for one in languages.values())
    header = ["", "", "chars/token", "bytes/token", "tokens/word", "in bytes", "single chars"]
    header += ["names whole"] * with_names
    rows = []
    for language in dict.fromkeys(name for languages in measured.values() for name in languages):
        for tokenizer, languages in measured.items():
            if (one := languages.get(language)) is not None:
                rows.append([language, tokenizer, *_figures(one), *([_whole(one)] * with_names)])
    return table(header, rows)


def _figures(one: Fertility) -> list[str]:
    """Of one tokenizer on one language."""
    return [
        f"{one.characters_a_token:.3f}",
        f"{one.bytes_a_token:.3f}",
        "-" if one.tokens_a_word is None else f"{one.tokens_a_word:.3f}",
        _percent(one.fallback, one.tokens),
        _percent(one.single, one.tokens),
    ]


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "-"


def _whole(one: Fertility) -> str:
    return f"{one.names_whole / one.names:.1%} of {one.names:,}" if one.names else "-"


def consequence_lines(
    measured: Measured, sizes: Mapping[str, int], corpus_bytes: Mapping[str, int], hidden_size: int, *, tied: bool
) -> list[str]:
    """A table of what each vocabulary means: for a corpus, and for a model.

    Args:
        sizes: of the vocabularies.
        corpus_bytes: of the whole text of each language, of which a sample was measured.
        hidden_size: of the model; its embedding has 2 V h parameters, or V h where it is `tied` to the output layer.
    """
    header = ["", "vocabulary", "never used", "tokens of the text", "", "embedding parameters"]
    rows, first = [], 0.0
    for name, languages in measured.items():
        tokens = sum(corpus_bytes[language] / one.bytes_a_token for language, one in languages.items() if one.tokens)
        first = first or tokens
        used = frozenset[int]().union(*(one.used for one in languages.values()))
        parameters = sizes[name] * hidden_size * (1 if tied else 2)
        change = f"{tokens / first - 1:+.1%}" if first and tokens != first else ""
        unused = _percent(sizes[name] - len(used), sizes[name])
        rows.append([name, f"{sizes[name]:,}", unused, f"{tokens:,.0f}", change, f"{parameters:,}"])
    return table(header, rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns: names to the left, figures to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    names = {column for column, title in enumerate(header) if not title and column < 2}
    return [
        "  ".join(
            cell.ljust(width) if column in names else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    ]


def write_plot(measured: Measured, path: str | Path) -> None:
    """Draw the figures of the table, a bar for each tokenizer in each language, as .png, .svg or .pdf."""
    from matplotlib.figure import Figure  # seconds to import, seldom needed

    panels: dict[str, Any] = {
        "characters a token": lambda one: one.characters_a_token,
        "% of tokens that are bytes": lambda one: 100 * one.fallback / max(one.tokens, 1),
        "% of tokens that are one character": lambda one: 100 * one.single / max(one.tokens, 1),
    }
    if any(one.names for languages in measured.values() for one in languages.values()):
        panels["% of names kept whole"] = lambda one: 100 * one.names_whole / max(one.names, 1)
    languages = list(dict.fromkeys(name for of_one in measured.values() for name in of_one))
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels))
    width = 0.8 / len(measured)
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        for number, (tokenizer, of_one) in enumerate(measured.items()):
            places = [place + (number - (len(measured) - 1) / 2) * width for place in range(len(languages))]
            axis.bar(places, [value(of_one[name]) for name in languages], width, label=tokenizer)
        axis.set_xticks(range(len(languages)), languages)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(measured), 4))
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix.lstrip("."), dpi=150)
    write_bytes(path, content.getbuffer())
