"""The watch over the other ranks of a run, from when they have answered the first roll call to its last step."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from megatron_ext.config import RunConfig, WatchdogConfig
from megatron_ext.config.load import values_of
from megatron_ext.errors import TrainingError
from megatron_ext.runtime.liveness import Liveness
from megatron_ext.runtime.watchdog import STALLS

WAY_OUT = "the same command goes on from the newest checkpoint"


@contextmanager
def watching(run: RunConfig, limits: WatchdogConfig | None = None, way_out: str = WAY_OUT) -> Iterator[Liveness]:
    """With an eye on the other ranks: one that is missing is named, and nobody waits for it.

    Args:
        limits: of the time that what is inside may stand still; those of the run, if not given.
        way_out: what to do where a rank is missing; the end of the message.
    """
    stalls = Path(run.checkpoint.directory) / STALLS
    watch = Liveness(limits or run.runtime.watchdog, stalls, partial(_tell_of_start, run), way_out)
    with watch as others, others.named_if_missing():
        yield others


def _tell_of_start(run: RunConfig, kind: str, text: str, ends: bool) -> None:
    """What the watch calls before the run has its records."""
    from megatron_ext.monitoring.monitor import (
        tell_of_failed_restart,  # with all that training imports, which it watches
    )

    tell_of_failed_restart(values_of(run), TrainingError(text))
