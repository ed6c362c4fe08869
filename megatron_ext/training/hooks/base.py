"""What a hook is told of a run, and what it may do then."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.monitoring.events import Event
from megatron_ext.training.verdict import Rollback, Verdict

if TYPE_CHECKING:
    from megatron_ext.training.session import Session
    from megatron_ext.training.step import StepResult


@dataclass(frozen=True)
class StepDone:
    """A step that is behind the run; the same on every rank."""

    iteration: int
    """Steps done, with this one."""
    last: int
    """The step after which this job ends."""
    verdict: Verdict
    first_sample: int
    """The first of the samples that the step consumed; the next one is that of the run's position."""
    result: "StepResult | None" = None
    """What it computed; None where it was passed over unseen (train.skip_steps)."""
    signal: int = 0
    """The signal after which the run saves and stops now; 0 for none."""
    ends_stage: bool = False
    """The next step is of another stage of the data, or there is none."""

    def is_due(self, interval: int | None) -> bool:
        """Whether what happens every `interval` steps and after the last one happens now."""
        if self.iteration >= self.last:  # a rollback passes over steps, beyond the last of this job too
            return True
        return not isinstance(self.verdict, Rollback) and interval is not None and self.iteration % interval == 0


class Hook:
    """Does something around the steps of a run; a hook overrides what it needs.

    Every rank has the same hooks in the same order. All but `on_error`, `on_stall` and `close` are called on every rank
    at the same points, with the same figures, and may communicate; whether they do must not depend on the rank.
    """

    name = ""
    """Of its state in checkpoints, which no other has; empty where it has none."""

    def on_start(self, session: "Session") -> None:
        """The run is about to begin, or to go on: model, data and position are there."""

    def after_step(self, session: "Session", done: StepDone) -> None:
        """A step was taken, skipped or rolled back."""

    def after_save(self, checkpoint: Path) -> None:
        """`checkpoint` is complete."""

    def on_error(self, error: BaseException) -> None:
        """The run ends with `error`, maybe before `on_start`. No collective: another rank may never join it."""

    def on_stall(self, event: Event, *, ends: bool) -> None:
        """A rank is lost or hangs, which `event` says; with `ends` this rank ends next, and no `on_error` follows.

        Called from a thread of its own while the main thread waits for what does not come. No collective.
        """

    def close(self) -> None:
        """The run ends as it should."""

    def figures(self) -> Mapping[str, float]:
        """Numbers that reports add under their names, such as how far something lags; asked on rank 0 alone."""
        return {}

    def state(self) -> Mapping[str, Any]:
        """What a checkpoint keeps of it: values of JSON by their keys in `state.json`. Rank 0's are saved."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned, before `on_start`. What an older checkpoint lacks is not there.

        Raises:
            ValueError: it is no such state.
        """
