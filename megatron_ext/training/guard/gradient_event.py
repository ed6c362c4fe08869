"""The gradients of a step by layer and group of weights, as what the records are told."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from megatron_ext.mcore.gradients import gradient_statistics
from megatron_ext.monitoring.events import GRADIENTS, Event

if TYPE_CHECKING:
    from megatron_ext.training.session import Session


def gradient_event(session: "Session", step: int) -> Event:
    """Of the gradients that the optimizer has for `step`, before clipping; every rank must call this."""
    layers = session.run.model.num_layers
    found = gradient_statistics(session.chunks, session.optimizer, layers, session.groups.world)
    records: dict[str, dict[str, dict[str, float]]] = {}
    for (layer, group), statistics in found.items():
        place = "outside" if layer is None else f"layer_{layer:03d}"
        records.setdefault(place, {})[group] = asdict(statistics)
    (layer, group), largest = max(found.items(), key=lambda item: item[1].norm)
    where = group if layer is None else f"{group} of layer {layer}"
    text = f"gradients by layer and group: the largest norm, {largest.norm:.4g}, has {where}"
    return Event(GRADIENTS, step, text, {GRADIENTS: records})
