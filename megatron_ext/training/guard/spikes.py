"""Which losses and gradient norms stand out, by what came before them; pure functions of the figures of past steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_ext.config import RollbackConfig, SpikeConfig

_DECAY = 0.9
"""Of the running mean of the loss."""
_WINDOW, _LEAST = 128, 64
"""Losses that the running mean is compared with: at most, and at least."""


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and unbiased standard deviation."""
    array = np.array(values)
    return float(array.mean()), float(array.std(ddof=1))


class SpikeWindow:
    """The rule of OLMo-core's SkipStepOptimizer (optim/skip_step_optimizer.py).

    The latest loss and norm are compared with mean and unbiased standard deviation of those before, one-sided. Values
    of steps that were skipped stay in the window, so that a new level is not refused for ever. Only finite ones enter.
    """

    def __init__(self, settings: SpikeConfig) -> None:
        self._settings = settings
        self._values: dict[str, list[float]] = {"loss": [], "gradient norm": []}

    def judge(self, loss: float, norm: float) -> str | None:
        """Why a step stands out, None where it does not; from now on it is one of those before."""
        found = None
        for name, latest in (("loss", loss), ("gradient norm", norm)):
            before, kept = self._values[name], self._settings
            if len(before) + 1 >= max(kept.min_steps, 3):  # a deviation takes two
                mean, deviation = _spread(before)
                if latest - mean > kept.sigma * deviation and found is None:
                    found = (
                        f"{name} {latest:.4g} is above {mean + kept.sigma * deviation:.4g}, {kept.sigma:g} standard "
                        f"deviations over the mean of {len(before)} steps"
                    )
            self._values[name] = [*before, latest][-kept.window :]
        return found

    def state(self) -> dict[str, Any]:
        """The values, for a checkpoint."""
        return {name: list(values) for name, values in self._values.items()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        for name in self._values:
            self._values[name] = [float(value) for value in saved.get(name, ())][-self._settings.window :]


class Excess:
    """For how long the running mean of the loss has been above the losses before.

    What stands out by itself does not enter the losses it is compared with: a jump cannot become the level that it is
    measured by.
    """

    def __init__(self, settings: RollbackConfig) -> None:
        self._settings = settings
        self._usual: list[float] = []
        self._mean: float | None = None
        self._steps = 0

    @property
    def steps(self) -> int:
        """Steps in a row until now."""
        return self._steps

    def note(self, loss: float) -> str | None:
        """Take in the loss of a step; say so where it has been too high for too long."""
        self._mean = loss if self._mean is None else _DECAY * self._mean + (1 - _DECAY) * loss
        most = None
        if len(self._usual) >= _LEAST:
            mean, deviation = _spread(self._usual)
            most = mean + max(self._settings.min_excess, self._settings.sigma * deviation)
        if most is None or loss <= most:
            self._usual = [*self._usual, loss][-_WINDOW:]
        self._steps = self._steps + 1 if most is not None and self._mean > most else 0
        if self._steps < self._settings.sustained_steps:
            return None
        return f"the running mean of the loss, {self._mean:.4g}, is above {most:.4g} for {self._steps} steps"

    def state(self) -> dict[str, Any]:
        """What it remembers, for a checkpoint."""
        return {"usual": list(self._usual), "mean": self._mean, "steps": self._steps}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self._usual = [float(value) for value in saved.get("usual", ())][-_WINDOW:]
        self._mean = None if saved.get("mean") is None else float(saved["mean"])
        self._steps = int(saved.get("steps", 0))
