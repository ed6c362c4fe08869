"""Which checkpoints of a run stay, and the removal of the others."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.checkpoint.find import complete_checkpoints, iteration_of
from megatron_ext.files import remove_published

_NEVER_REMOVED = 2
"""So many of the newest stay: one that turns out to be bad, which a run goes back from, is never the only one."""


@dataclass(frozen=True)
class Retention:
    """What stays besides the newest: checkpoints of some steps."""

    keep_last: int | None = None
    """How many of the newest; None removes nothing."""
    keep_every: int | None = None
    """Those of multiples of so many steps."""
    keep_matching: str | None = None
    """Those whose step, as it is written in decimal, this regular expression matches as a whole."""
    keep_initial: bool = False
    """The one of step 0."""

    @property
    def newest(self) -> int | None:
        """How many of the newest stay, whatever their steps; None: all."""
        return None if self.keep_last is None else max(self.keep_last, _NEVER_REMOVED)

    def keeps(self, iteration: int) -> bool:
        """Whether the checkpoint of this step stays, however old it is."""
        every = self.keep_every is not None and iteration > 0 and iteration % self.keep_every == 0
        named = self.keep_matching is not None and re.fullmatch(self.keep_matching, str(iteration)) is not None
        return every or named or (self.keep_initial and iteration == 0)

    def superseded(self, checkpoints: Sequence[Path]) -> list[Path]:
        """Those of `checkpoints`, all complete and oldest first, that may go."""
        if self.newest is None:
            return []
        older = checkpoints[: -self.newest]
        return [checkpoint for checkpoint in older if not self.keeps(iteration_of(checkpoint))]


def remove_superseded(directory: Path, retention: Retention, in_use: Collection[Path] = ()) -> None:
    """Remove what need not stay of the checkpoints in `directory`, but for those `in_use`.

    Raises:
        OSError: one could not be removed.
    """
    for old in retention.superseded(complete_checkpoints(directory)):
        if old not in in_use:
            remove_published(old)
