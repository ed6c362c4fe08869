"""Rules of the learning-rate schedule."""

from collections.abc import Sequence
from typing import Any

from megatron_ext.config.data import Stage
from megatron_ext.config.rules.registry import rule
from megatron_ext.config.schedule import Schedule

_SAID_TWICE = "both say it; keep one of them"


def _register_one_of(*keys: str) -> None:
    """Two keys of the same meaning are never both given: neither would win."""

    def _is_said_once(first: Any, second: Any) -> str | None:
        return _SAID_TWICE if first and second else None

    for number, first in enumerate(keys):
        for second in keys[number + 1 :]:
            rule(first, second)(_is_said_once)


_register_one_of("schedule.warmup_iters", "schedule.warmup_tokens", "schedule.warmup.stage")
_register_one_of("schedule.decay_iters", "schedule.decay_tokens", "schedule.decay.stage")
_register_one_of("schedule.wsd_decay_iters", "schedule.wsd_decay_tokens", "schedule.decay.stage")


@rule("schedule.warmup_iters", "train.train_iters")
def _warmup_fits(warmup: int, iters: int) -> str | None:
    return "warmup is longer than the run" if warmup > iters > 0 else None


@rule("schedule.warmup_iters", "schedule.decay_iters")
@rule("schedule.warmup_tokens", "schedule.decay_tokens")
def _decay_after_warmup(warmup: int | None, decay: int | None) -> str | None:
    return "the decay must end after the warmup" if decay and decay <= (warmup or 0) else None


@rule("schedule.wsd_decay_iters", "schedule.warmup_iters", "train.train_iters")
def _wsd_fits(decay: int | None, warmup: int, iters: int) -> str | None:
    return "warmup and final decay together are longer than the run" if decay and decay + warmup > iters > 0 else None


@rule("schedule.warmup.stage", "schedule.decay.stage")
def _warmup_and_decay_are_two_stages(warmup: str, decay: str) -> str | None:
    return "the decay must end after the warmup" if warmup == decay else None


@rule(given=("schedule", "data.stages"))
def _named_stages_are_covered(schedule: Schedule, stages: Sequence[Stage]) -> list[str]:
    faults = _not_covered("schedule", schedule, _covered(stages, 0))
    for number, stage in enumerate(stages):
        if stage.schedule is not None:
            key = f"data.stages.{number}.schedule"
            faults += _not_covered(key, stage.schedule, _covered(stages, number))
    return faults


def _covered(stages: Sequence[Stage], first: int) -> list[str]:
    """The stages that a schedule covers which begins with stage `first`: to where the next begins."""
    last = next((n for n in range(first + 1, len(stages)) if stages[n].schedule is not None), len(stages))
    return [stage.name for stage in stages[first:last]]


def _not_covered(key: str, schedule: Schedule, covered: Sequence[str]) -> list[str]:
    """Stages that `schedule` names and does not cover; a warmup is over with the first."""
    faults = []
    for name, allowed in (("warmup", covered[:1]), ("decay", covered)):
        named = getattr(schedule, name, None)
        if named is not None and named.stage not in allowed:
            known = f"it covers {', '.join(covered)}" if covered else "there are no data.stages"
            first = "; a warmup is the first stage of its schedule" if named.stage in covered else ""
            faults.append(f"{key}.{name}.stage = {named.stage!r}: is no stage of this schedule: {known}{first}")
    return faults


@rule("schedule.min_lr", "optimizer.lr")
def _floor_below_peak(floor: float, peak: float) -> str | None:
    return "the final learning rate is above the peak" if floor > peak else None


@rule("schedule.decay_style", "schedule.min_lr")
def _geometric_needs_floor(style: str, floor: float) -> str | None:
    return "a geometric decay never reaches 0; set min_lr" if style == "geometric" and floor == 0 else None


@rule("schedule.decay_style")
def _exponential_has_two_meanings(style: str) -> str | None:
    if style != "exponential":
        return None
    return (
        "geometric is what this name meant here until now (the rate falls by the same factor at each step), "
        "exponential_megatron what it means in Megatron-LM; set one of them"
    )
