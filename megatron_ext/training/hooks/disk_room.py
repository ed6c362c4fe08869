"""Says while there is time when the disk has no room for the checkpoints to come."""

import shutil
import time
from pathlib import Path

import torch.distributed as dist

from megatron_ext.checkpoint.find import complete_checkpoints, iteration_of
from megatron_ext.config import RunConfig
from megatron_ext.monitoring.events import Event, Tell
from megatron_ext.planning.amounts import size
from megatron_ext.planning.room import bytes_on_disk, checkpoints_to_come
from megatron_ext.training.hooks.base import Hook, StepDone
from megatron_ext.training.session import Session

_SECONDS_BETWEEN = 60.0


class DiskRoom(Hook):
    """Looks every minute and after each checkpoint, on rank 0; speaks when it has become too little, or less than that.

    Args:
        tell: told of it.
    """

    def __init__(self, run: RunConfig, tell: Tell) -> None:
        self._settings, self._tell = run.checkpoint, tell
        self._last = min(run.train.train_iters, run.train.stop_at_iteration or run.train.train_iters)
        self._each = bytes_on_disk(run)
        self._missing = 0
        """What was said last: 0 is enough, 1 too little for all that come, 2 for the next one."""
        self._iteration, self._looked_at = 0, 0.0

    def on_start(self, session: Session) -> None:
        """Look."""
        self._look(session.state.iteration)

    def after_step(self, session: Session, done: StepDone) -> None:
        """Look where it is time to."""
        self._iteration = done.iteration
        if time.monotonic() - self._looked_at > _SECONDS_BETWEEN:
            self._look(done.iteration)

    def after_save(self, checkpoint: Path) -> None:
        """Look."""
        self._look(self._iteration)

    def _look(self, iteration: int) -> None:
        if dist.get_rank() != 0:
            return
        self._looked_at = time.monotonic()
        directory = Path(self._settings.directory)
        there = [iteration_of(path) for path in complete_checkpoints(directory)]
        coming = checkpoints_to_come(self._settings, iteration, self._last, there)
        free = shutil.disk_usage(
            next(place for place in (directory, *directory.absolute().parents) if place.exists())
        ).free
        missing = 0 if coming * self._each <= free else 2 if self._each > free else 1
        if missing > self._missing:
            what = f"the next checkpoint, of about {size(self._each)}"
            if missing == 1:
                what = f"the {coming:,} checkpoints to come, of about {size(self._each)} each"
            text = (
                f"{directory}: {size(free)} are free, too little for {what}; make room, or lower checkpoint.keep_last"
            )
            self._tell(Event("disk", iteration, text, {"free_bytes": free, "checkpoint_bytes": self._each}))
        self._missing = missing
