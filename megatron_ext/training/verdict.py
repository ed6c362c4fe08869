"""What becomes of a step, decided once its gradient is known and before anything is updated."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ext.errors import TrainingError


@dataclass(frozen=True)
class Take:
    """The weights are updated."""


@dataclass(frozen=True)
class Skip:
    """Nothing is updated, and the run goes on with the samples that follow."""

    reason: str


@dataclass(frozen=True)
class Rollback:
    """Nothing is updated; weights and optimizer become those of an earlier checkpoint, and the run goes on later."""

    reason: str
    checkpoint: Path
    """Where they are from."""
    resume_at: int
    """Steps that are behind the run then: the data up to there count as consumed."""


Verdict = Take | Skip | Rollback


@dataclass(frozen=True)
class FirstNonFinite:
    """Where a step first met a number that is not finite."""

    text: str
    """For people: the rank, the place and how it was found."""
    details: Mapping[str, Any]
    """For the records: values of JSON by name."""


@dataclass(frozen=True)
class Figures:
    """What a judge is told of a step; the same on every rank."""

    losses: Mapping[str, Tensor]
    """Each sum of the task over the global batch, divided by `units`."""
    grad_norm: float
    """Global norm of the gradient before clipping."""
    units: Tensor
    """What of the global batch counted."""
    first_nonfinite: Callable[[], FirstNonFinite]
    """Finds out, by computing the step once more, where it first met a number that is not finite. Every rank must call
    it, or none; the step cannot be taken afterwards."""

    def values(self) -> dict[str, float]:
        """The losses as numbers, by name."""
        return dict(zip(self.losses, torch.stack(list(self.losses.values())).tolist(), strict=True))


class Judge(Protocol):
    """Decides on a step; every rank is asked with the same figures and must answer the same."""

    def __call__(self, figures: Figures) -> Verdict:
        """The verdict on a step.

        Raises:
            TrainingError: the run cannot go on.
        """


NO_LABEL = (
    "no label of the global batch counts, so there is no loss: every token is masked (with data.eod_mask_loss, the "
    "batch holds nothing but ends of documents)"
)


def take_finite(figures: Figures) -> Verdict:
    """Take every step whose gradient is finite, and end the run at one whose is not."""
    if math.isfinite(figures.grad_norm):
        return Take()
    if not float(figures.units):
        raise TrainingError(f"{NO_LABEL}; pass over it with train.skip_steps")
    loss = float(next(iter(figures.losses.values())))
    raise TrainingError(
        f"the loss is {loss:g} and the gradient norm {figures.grad_norm:g}; the weights were not updated. Start again "
        "to go on from the newest checkpoint, past this step (train.skip_steps) or with a lower optimizer.lr"
    )
