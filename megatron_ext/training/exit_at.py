"""When this job ends before its run does (train.exit_at), by rank 0's clock."""

import dataclasses
import logging
import os
import time
from dataclasses import dataclass

from megatron_ext.config import ExitAt
from megatron_ext.errors import EnvironmentFault
from megatron_ext.launcher import job_start
from megatron_ext.training.hooks.base import StepDone
from megatron_ext.training.signals import EXIT_AT

log = logging.getLogger(__name__)

_JOB_ENDS = ("MEGATRON_EXT_JOB_END", "SLURM_JOB_END_TIME")
"""Variables that say when the job's time is over, in seconds since 1970."""


@dataclass(frozen=True)
class Moment:
    """When the job is to stop, and why."""

    seconds: float
    """Since 1970."""
    key: str
    """The key that says so."""


def exit_moment(settings: ExitAt) -> Moment | None:
    """The first moment that `settings` name; None where they name none. Says so, where a limit is not known.

    Raises:
        EnvironmentFault: what says when the job's time is over is no number.
    """
    moments = []
    if settings.minutes is not None:
        moments.append(Moment(job_start() + 60 * settings.minutes, "train.exit_at.minutes"))
    if settings.seconds is not None and settings.seconds <= job_start():
        # The jobs that queue themselves again at that time would do a step each.
        log.warning("train.exit_at.time has no effect: it was over when this job began")
    elif settings.seconds is not None:
        moments.append(Moment(settings.seconds, "train.exit_at.time"))
    if settings.minutes_before_limit is not None:
        key = "train.exit_at.minutes_before_limit"
        if (end := _job_end()) is None:
            log.warning("%s has no effect: neither %s is set", key, " nor ".join(_JOB_ENDS))
        else:
            moments.append(Moment(end - 60 * settings.minutes_before_limit, key))
    first = min(moments, key=lambda moment: moment.seconds, default=None)
    if first is not None:
        local = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(first.seconds))
        log.info("%s: saves and ends at %s", first.key, local)
    return first


def _job_end() -> float | None:
    for name in _JOB_ENDS:
        if text := os.environ.get(name):
            try:
                end = float(text)
                time.localtime(end)
            except (ValueError, OverflowError, OSError):  # no number, or nan, or no time that there is
                raise EnvironmentFault(f"{name} = {text!r}: expected seconds since 1970") from None
            return end
    return None


def ended_by_plan(settings: ExitAt, done: StepDone, began: int) -> StepDone:
    """`done`, as the last step of this job where `settings` say so; the same on every rank.

    Args:
        began: steps that were behind the run when this job began.
    """
    if done.signal or done.iteration >= done.last or settings.iteration is None:
        return done
    # A rollback passes over steps, and maybe over this one.
    ends = began < settings.iteration <= done.iteration
    return dataclasses.replace(done, signal=EXIT_AT) if ends else done
