"""What a model forgot and learned: its loss on texts against that of the model before, on the same documents."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ext.errors import DataError
from megatron_ext.evaluation.text_loss import TextLoss, half_interval


@dataclass(frozen=True)
class Change:
    """Of one text, in bits per byte: comparable also where the tokenizer is another."""

    before: float
    after: float
    interval: float
    """Half of the 95 % interval of their difference, over documents: both models read the same ones, so that what
    makes a document hard cancels."""

    @property
    def difference(self) -> float:
        """Above 0: forgotten."""
        return self.after - self.before

    @property
    def verdict(self) -> str:
        """In a word; a difference within its interval is none."""
        if math.isnan(self.interval):
            return "one document says nothing"
        if abs(self.difference) <= self.interval:
            return "no difference seen"
        return "forgotten" if self.difference > 0 else "learned"

    def record(self) -> dict[str, float | str | None]:
        """All figures by name."""
        interval = None if math.isnan(self.interval) else self.interval
        figures = {"before": self.before, "after": self.after, "difference": self.difference, "interval": interval}
        return {**figures, "verdict": self.verdict}


def changes(before: Mapping[str, TextLoss], after: Mapping[str, TextLoss]) -> dict[str, Change]:
    """The change of each text.

    Raises:
        DataError: the models did not read the same documents.
    """
    found = {}
    for name, old in before.items():
        new = after[name]
        if old.bytes != new.bytes:
            raise DataError(f"{name}: both models must read the same documents; it was changed meanwhile")
        differences = [(b - a) / math.log(2) for a, b in zip(old.nats, new.nats, strict=True)]
        found[name] = Change(old.bits_per_byte, new.bits_per_byte, half_interval(differences, old.bytes))
    return found
