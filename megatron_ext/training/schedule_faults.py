"""What is wrong with a schedule once the lengths of the plan are known, and whether it moved since a checkpoint."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.run_file import read_run
from megatron_ext.checkpoint.state_file import read_scalars
from megatron_ext.config import ConstantSchedule, RunConfig, WsdSchedule
from megatron_ext.data.stream.plan import RunPlan
from megatron_ext.training.schedule import Stretch, rates_at_ends, stretches

_WARMUP = ("warmup_tokens", "warmup", "warmup_iters")
_DECAY = ("decay", "decay_tokens", "wsd_decay_tokens", "decay_iters", "wsd_decay_iters")


def schedule_faults(run: RunConfig, plan: RunPlan) -> list[str]:
    """Every schedule of `run` that does not fit into the stages it covers, and every transition that does not."""
    faults = [fault for stretch in stretches(run, plan) for fault in _faults_of(stretch)]
    lengths = Counter[str]()
    for stage in plan.stages:
        lengths[stage.name] += stage.tokens
    for name, (transition, tokens) in {
        s.name: (s.stage.transition_tokens, lengths[s.name]) for s in plan.stages
    }.items():
        if transition > tokens:
            faults.append(f"data.stages: transition_tokens = {transition} of {name} are more than its {tokens} tokens")
    return faults


def schedule_warnings(run: RunConfig, plan: RunPlan) -> list[str]:
    """Stages at whose beginning the learning rate jumps up because they say no factor where the one before did."""
    warnings, ends = [], rates_at_ends(run, plan)
    for (_, before), (after, _), stage in zip(ends, ends[1:], plan.stages[1:], strict=False):
        previous = plan.stages[stage.number - 1]
        own = stage.stage.schedule is not None and stage.name != previous.name
        if stage.lr_scale > previous.lr_scale and not stage.stage.transition_tokens and not own:
            warnings.append(
                f"the learning rate jumps from {before:.3g} to {after:.3g} as stage {stage.name} begins: its lr_scale "
                f"is {stage.lr_scale:g}, after {previous.lr_scale:g}; set lr_scale, or transition_tokens"
            )
    return warnings


def _faults_of(stretch: Stretch) -> Iterator[str]:
    schedule, end = stretch.schedule, stretch.tokens(stretch.last_step)
    warmup, decay = (_said(stretch, names) for names in (_WARMUP, _DECAY))
    for name in ("warmup", "decay"):
        named = getattr(schedule, name, None)
        if named is not None and named.stage not in [stage.name for stage in stretch.stages]:
            yield (
                f"{stretch.key}.{name}.stage = {named.stage!r}: a stage that was ended began a schedule that goes on "
                "over it; begin another one there"
            )
            return
    if stretch.warmed_up > end:
        yield f"{warmup}: the warmup is longer than the {end - stretch.first_token} tokens that the schedule covers"
        return
    if isinstance(schedule, ConstantSchedule) or (decay_ends := stretch.decay_in_tokens()) is None:
        return
    begins, ends = decay_ends
    if isinstance(schedule, WsdSchedule):
        if begins < stretch.warmed_up or begins < stretch.first_token:
            yield f"{', '.join(filter(None, (warmup, decay)))}: warmup and final decay together are longer than the run"
    elif decay and ends <= stretch.warmed_up:
        yield f"{', '.join(filter(None, (warmup, decay)))}: the decay must end after the warmup"


def _said(stretch: Stretch, names: tuple[str, ...]) -> str:
    """The key that says a warmup or a decay, with its value; empty where none does."""
    for name in names:
        if value := getattr(stretch.schedule, name, None):
            return (
                f"{stretch.key}.{name} = {value}"
                if isinstance(value, int)
                else f"{stretch.key}.{name}.stage = {value.stage!r}"
            )
    return ""


def schedule_end(run: RunConfig, plan: RunPlan, step: int) -> dict[str, Any]:
    """Of the schedule of `step`, its kind and where it ends, in steps and tokens of the run; a checkpoint keeps it."""
    stretch = _of_step(run, plan, step)
    follows = _follows_the_end(stretch.schedule)
    return {"kind": stretch.schedule.kind, "follows_end": follows} | {
        "steps": stretch.last_step,
        "tokens": stretch.tokens(stretch.last_step),
    }


def moved_decay(run: RunConfig, plan: RunPlan, checkpoint: Path, step: int) -> str | None:
    """Why a run that goes on from `checkpoint` at `step` would have another decay than before, without having said so.

    Raises:
        CheckpointError: it cannot be read.
    """
    saved = read_scalars(checkpoint).get("schedule_end")
    return decay_moved(run, plan, step, _end_of_older(read_run(checkpoint)) if saved is None else saved)


def _end_of_older(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `schedule_end` would have said of a run whose checkpoints did not have it; it had one stage."""
    schedule, train = saved.get("schedule") or {}, saved.get("train") or {}
    steps, size = train.get("train_iters", 0), train.get("global_batch_size", 0)
    follows = schedule.get("kind") in ("linear", "cosine") and schedule.get("decay_iters") is None
    tokens = steps * size * (saved.get("data") or {}).get("sequence_length", 0)
    return {"kind": schedule.get("kind"), "follows_end": follows and steps > 0, "steps": steps, "tokens": tokens}


def decay_moved(run: RunConfig, plan: RunPlan, step: int, saved: Mapping[str, Any]) -> str | None:
    """`moved_decay`, given what `schedule_end` said when the run was saved."""
    stretch, now = _of_step(run, plan, step), schedule_end(run, plan, step)
    unit, name = ("steps", "decay_iters") if stretch.in_steps else ("tokens", "decay_tokens")
    # A length in tokens or samples is rounded up to whole batches, which may be others by now.
    rounded = [stage for stage in stretch.stages if stage.stage.steps is None]
    rounding = sum(stage.global_batch_size * stage.sequence_length for stage in rounded)
    unmoved = now["kind"] != saved["kind"] or abs(now[unit] - saved[unit]) <= rounding
    if unmoved or not (now["follows_end"] and saved["follows_end"]):
        return None
    first = stretch.first_step if stretch.in_steps else stretch.first_token
    return (
        f"{stretch.key}.kind = {now['kind']!r}: it decays to the end of what it covers, which was {saved[unit]:,} "
        f"{unit} in the checkpoint and is {now[unit]:,} in this run, so that the learning rate would jump; set "
        f"{stretch.key}.{name} = {saved[unit] - first} to keep the decay as it was, or {now[unit] - first} to stretch "
        "it on purpose (with wsd the decay may come at any time)"
    )


def _follows_the_end(schedule: Any) -> bool:
    """Whether a decay ends where its stages do because nothing else is said."""
    if schedule.kind not in ("linear", "cosine"):
        return False
    return schedule.decay_iters is None and schedule.decay_tokens is None and schedule.decay is None


def _of_step(run: RunConfig, plan: RunPlan, step: int) -> Stretch:
    covered = stretches(run, plan)
    return next(stretch for stretch in reversed(covered) if stretch.first_step <= step)
