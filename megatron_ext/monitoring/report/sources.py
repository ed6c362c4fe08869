"""What a run made of each source of its data: curves of its loss in training and validation, and how much was read."""

import math
from collections.abc import Sequence
from typing import Any

from megatron_ext.monitoring.report.phases import Phase

_MOST_POINTS = 60_000
"""Of all curves of one plot together."""

SOURCES_HEADER = ("source", "tokens read", "epochs", "training loss", "validation loss", "lowest", "perplexity")


def has_sources(phase: Phase) -> bool:
    """Whether there is more than one source to tell apart."""
    return len(_names(phase.steps)) > 1 or len(_names(phase.validations)) > 1


def source_data(phase: Phase) -> dict[str, Any]:
    """All that is drawn of sources, ready for JSON."""
    names = _names(phase.steps)
    columns = [phase.steps[a:b] for a, b in stretches(len(phase.steps), _MOST_POINTS // max(1, len(names)))]
    stages = [(step["iteration"], step.get("stage")) for step in phase.steps]
    return {
        "step": [column[-1]["iteration"] for column in columns],
        "loss": {name: [mean_loss(column, name) for column in columns] for name in names},
        "epochs": {name: [_last(column, name, "epochs") for column in columns] for name in names},
        "validation_step": [validation["iteration"] for validation in phase.validations],
        "validation": {
            name: [_drawn(validation["sources"].get(name, {}).get("loss")) for validation in phase.validations]
            for name in _names(phase.validations)
        },
        "stages": [at for (_, before), (at, stage) in zip(stages, stages[1:], strict=False) if stage != before],
    }


def source_rows(phase: Phase) -> list[tuple[str, ...]]:
    """A row of SOURCES_HEADER for each source."""
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys([*_names(phase.steps), *_names(phase.validations)]):
        tokens, epochs, loss = (_last(phase.steps, name, key) for key in ("consumed_tokens", "epochs", "loss"))
        validated = [_drawn(validation["sources"].get(name, {}).get("loss")) for validation in phase.validations]
        losses = [value for value in validated if value is not None]
        rows.append(
            (
                name,
                "-" if tokens is None else f"{tokens:,.0f}",
                "-" if epochs is None else f"{epochs:.3f}",
                "-" if loss is None else f"{loss:.3f}",
                f"{losses[-1]:.3f}" if losses else "-",
                f"{min(losses):.3f}" if losses else "-",
                f"{math.exp(losses[-1]):,.4g}" if losses and losses[-1] < 700 else "-",
            )
        )
    return rows


def stretches(count: int, most: int) -> list[tuple[int, int]]:
    """`count` things in at most `most` stretches of about one length."""
    number = min(count, most)
    bounds = [count * i // number for i in range(number + 1)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def mean_loss(steps: Sequence[dict[str, Any]], name: str) -> float | None:
    """Mean loss of a source over `steps`, each counting by its tokens: a rare source is in few of them."""
    read = [source for step in steps if (source := (step.get("sources") or {}).get(name))]
    weighed = [(_drawn(source.get("loss")), _drawn(source.get("supervised_tokens")) or 0.0) for source in read]
    if len(weighed) == 1:
        return weighed[0][0]
    total = sum(weight for loss, weight in weighed if loss is not None)
    return sum(loss * weight for loss, weight in weighed if loss is not None) / total if total else None


def _names(records: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record.get("sources") or ()))


def _last(steps: Sequence[dict[str, Any]], name: str, key: str) -> float | None:
    """The newest value that was reported of a source."""
    for step in reversed(steps):
        if (value := _drawn((step.get("sources") or {}).get(name, {}).get(key))) is not None:
            return value
    return None


def _drawn(value: Any) -> float | None:
    """A number that can be drawn, or None."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None
