"""Which lines of a metrics file can be drawn: files come cut, edited and from other versions."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

log = logging.getLogger(__name__)

_WHOLE = ("iteration", "consumed_tokens")
_RATES = ("tokens_per_second", "tflops_per_device")
_MOST = 1 << 63


def drawable(records: Sequence[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """The reports of training steps and validations among `records`; a warning says how many others there are.

    A step whose MoE layers are not those of most other steps is kept without them, and so is what is no source.
    """
    kept = [record for record in records if _is_step(record) or _is_validation(record)]
    if len(kept) < len(records):
        log.warning("%s: %d of %d lines are no reports and left out", source, len(records) - len(kept), len(records))
    shapes = Counter(shape for record in kept if (shape := _shape_of_experts(record.get("moe"))))
    usual = shapes.most_common(1)[0][0] if shapes else None
    for record in kept:
        if record.get("moe") and _shape_of_experts(record["moe"]) != usual:
            record["moe"] = None
        record["sources"] = _whole_sources(record.get("sources"))
        for name in ("step_seconds", "figures"):
            record[name] = numbers_of(record.get(name))
    return kept


def drawable_starts(starts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of starts and continuations that say at which step."""
    return [start for start in starts if _is_whole(start.get("iteration")) and isinstance(start.get("run", {}), dict)]


def drawable_events(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What happened besides steps, as far as it says what and at which step."""
    return [
        {**event, "text": event["text"] if isinstance(event.get("text"), str) else event["event"]}
        for event in events
        if _is_whole(event.get("iteration")) and isinstance(event["event"], str)
    ]


def _is_step(record: dict[str, Any]) -> bool:
    return (
        all(_is_whole(record.get(name)) for name in _WHOLE)
        and all(_is_number(record.get(name)) and math.isfinite(record[name]) for name in _RATES)
        and _is_number(record.get("loss"))
        and _is_time(record.get("time"))
    )


def _is_validation(record: dict[str, Any]) -> bool:
    return _is_whole(record.get("iteration")) and _is_number(record.get("validation_loss")) and "loss" not in record


def _shape_of_experts(moe: Any) -> tuple[tuple[str, int], ...] | None:
    """Layers and experts of a step's record; None where they are not whole."""
    if not isinstance(moe, dict):
        return None
    for name, layer in moe.items():
        if not (name.isascii() and name.isdecimal() and len(name) < 10 and isinstance(layer, dict)):
            return None
        load = layer.get("load")
        if not (isinstance(load, list) and load and all(_is_number(part) and math.isfinite(part) for part in load)):
            return None
        if not all(_is_number(value) for key, value in layer.items() if key != "load"):
            return None
    return tuple((name, len(layer["load"])) for name, layer in sorted(moe.items()))


def _whole_sources(sources: Any) -> dict[str, dict[str, Any]]:
    """What was reported of each source, as far as it is numbers; nothing of what older versions reported none of."""
    if not isinstance(sources, dict):
        return {}
    return {
        name: values
        for name, values in sources.items()
        if isinstance(values, dict) and all(value is None or _is_number(value) for value in values.values())
    }


def numbers_of(values: Any) -> dict[str, float]:
    """The numbers of a mapping by their names."""
    if not isinstance(values, dict):
        return {}
    return {name: value for name, value in values.items() if _is_number(value) and math.isfinite(value)}


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_number(value: Any) -> bool:
    """Whether it is a float, of any value, or a whole number that fits into one."""
    return type(value) is float or (type(value) is int and abs(value) < _MOST)


def _is_time(value: Any) -> bool:
    return value is None or (_is_number(value) and math.isfinite(value))
