"""What becomes of a step, decided once its gradient is known and before anything is updated."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

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
    """Nothing is updated, and the run goes back to its newest checkpoint."""

    reason: str


Verdict = Take | Skip | Rollback


class Judge(Protocol):
    """Decides on a step; every rank is asked with the same figures and must answer the same."""

    def __call__(self, losses: Mapping[str, Tensor], grad_norm: float, units: Tensor) -> Verdict:
        """The verdict on a step.

        Args:
            losses: each sum of the task over the global batch, divided by `units`.
            grad_norm: global norm of the gradient before clipping.
            units: what of the global batch counted.

        Raises:
            TrainingError: the run cannot go on.
        """


def take_finite(losses: Mapping[str, Tensor], grad_norm: float, units: Tensor) -> Verdict:
    """Take every step whose gradient is finite, and end the run at one whose is not."""
    if math.isfinite(grad_norm):
        return Take()
    if not float(units):
        raise TrainingError(
            "no label of the global batch counts, so there is no loss: every token is masked (with "
            "data.eod_mask_loss, the batch holds nothing but ends of documents); pass over it with train.skip_steps"
        )
    loss = float(next(iter(losses.values())))
    raise TrainingError(
        f"the loss is {loss:g} and the gradient norm {grad_norm:g}; the weights were not updated. Start again to "
        "go on from the newest checkpoint, past this step (train.skip_steps) or with a lower optimizer.lr"
    )
