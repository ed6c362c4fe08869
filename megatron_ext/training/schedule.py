"""The learning rate as a pure function of the plan and a step of it: nothing to save, nothing to restart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.config import ConstantSchedule, RunConfig, Schedule, WsdSchedule
from megatron_ext.data.stream.plan import RunPlan, StagePlan


def learning_rate(run: RunConfig, plan: RunPlan, step: int) -> float:
    """The learning rate of `step`, counted from 0.

    The warmup reaches the peak with its last step, a decay reaches `min_lr` with its last step. Where a stage begins
    with a schedule of its own, that one starts anew there and goes on until the next one. All is counted in tokens,
    but for what is said in steps where every step of the run has the same tokens.
    """
    covering = next(stretch for stretch in reversed(stretches(run, plan)) if stretch.first_step <= step)
    return _scale(plan, step) * covering.rate(run.optimizer.lr, step)


def rates_at_ends(run: RunConfig, plan: RunPlan) -> list[tuple[float, float]]:
    """The learning rates of the first and of the last step of each stage of `plan`."""
    ends = [(stage.first_step, stage.first_step + stage.steps - 1) for stage in plan.stages]
    return [(learning_rate(run, plan, first), learning_rate(run, plan, last)) for first, last in ends]


def stretches(run: RunConfig, plan: RunPlan) -> list["Stretch"]:
    """Every schedule of the run with the stages it covers: to where the next one begins."""
    stages = plan.stages
    # A stage that was changed on the way is several, of one name; the last says what it is now.
    own = {stage.name: stage.stage.schedule for stage in stages}
    begins = [n for n, stage in enumerate(stages) if n == 0 or (own[stage.name] and stage.name != stages[n - 1].name)]
    in_steps = len(run.step_tokens) == 1 and all(stage.steps is not None for stage in run.data.stages)
    found = []
    for first, last in zip(begins, [*begins[1:], len(stages)], strict=True):
        name = stages[first].name
        key = f"data.stages: schedule of {name}" if own[name] else "schedule"
        found.append(Stretch(key, own[name] or run.schedule, plan, stages[first:last], in_steps))
    return found


@dataclass(frozen=True)
class Stretch:
    """The stages that one schedule covers."""

    key: str
    """Where the configuration has the schedule."""
    schedule: Schedule
    plan: RunPlan
    stages: Sequence[StagePlan]
    in_steps: bool
    """Every step has the same tokens and the run so many steps, so that what is said in steps is counted in steps: its
    global batch size may then be changed on the way, and the schedule stays."""

    @property
    def first_step(self) -> int:
        """Steps of the run before it."""
        return self.stages[0].first_step

    @property
    def last_step(self) -> int:
        """Steps of the run with it."""
        return self.stages[-1].first_step + self.stages[-1].steps

    @property
    def first_token(self) -> int:
        """Tokens of the run before it."""
        return self.stages[0].first_token

    @property
    def warmed_up(self) -> int:
        """Tokens of the run at the end of the warmup."""
        schedule = self.schedule
        if schedule.warmup is not None:
            return self._stage(schedule.warmup.stage)[1]
        if schedule.warmup_tokens is not None:
            return self.first_token + schedule.warmup_tokens
        return self.tokens(self.first_step + schedule.warmup_iters)

    def tokens(self, steps: int) -> int:
        """Tokens of the run after so many steps of it, beyond its end too, and before its beginning."""
        if steps < 0:
            return -1
        last, beyond = self.plan.stages[-1], max(steps - self.plan.total_steps, 0)
        return self.plan.tokens_at(steps - beyond) + beyond * last.global_batch_size * last.sequence_length

    def rate(self, peak: float, step: int) -> float:
        """What the schedule says of a step of the run."""
        schedule, now = self.schedule, self.tokens(step + 1)
        if schedule.warmup_tokens is not None or schedule.warmup is not None:
            if now <= self.warmed_up:
                return peak * (now - self.first_token) / (self.warmed_up - self.first_token)
        elif step - self.first_step < schedule.warmup_iters:
            return peak * (step - self.first_step + 1) / schedule.warmup_iters
        decay = self._decay_in_steps()
        if decay is not None:
            now = step + 1
        else:
            decay = self.decay_in_tokens()
        if isinstance(schedule, ConstantSchedule) or decay is None:
            return peak
        style = schedule.decay_style if isinstance(schedule, WsdSchedule) else schedule.kind
        start, end = decay
        return _decayed(style, min(max((now - start) / max(end - start, 1), 0.0), 1.0), peak, schedule.min_lr)

    def decay_in_tokens(self) -> tuple[int, int] | None:
        """Tokens of the run before and with the decay; None where there is none."""
        schedule, end = self.schedule, self.tokens(self.last_step)
        if isinstance(schedule, ConstantSchedule):
            return None
        if isinstance(schedule, WsdSchedule):
            if schedule.decay is not None:
                return self._stage(schedule.decay.stage)
            if schedule.wsd_decay_tokens is not None:
                return end - schedule.wsd_decay_tokens, end
            steps = schedule.wsd_decay_iters
            return None if steps is None else (self.tokens(self.last_step - steps), end)
        if schedule.decay is not None:
            end = self._stage(schedule.decay.stage)[1]
        elif schedule.decay_tokens is not None:
            end = self.first_token + schedule.decay_tokens
        elif schedule.decay_iters is not None:
            end = self.tokens(self.first_step + schedule.decay_iters)
        return self.warmed_up, end

    def _decay_in_steps(self) -> tuple[int, int] | None:
        """Steps of the run before and with the decay; None where it is not counted in steps."""
        schedule, first, last = self.schedule, self.first_step, self.last_step
        if isinstance(schedule, ConstantSchedule) or not self.in_steps:
            return None
        if schedule.warmup_tokens is not None or schedule.warmup is not None or schedule.decay is not None:
            return None
        if isinstance(schedule, WsdSchedule):
            return None if schedule.wsd_decay_iters is None else (last - schedule.wsd_decay_iters, last)
        if schedule.decay_tokens is not None:
            return None
        return first + schedule.warmup_iters, first + schedule.decay_iters if schedule.decay_iters else last

    def _stage(self, name: str) -> tuple[int, int]:
        """Tokens of the run before and with the stage of this name."""
        parts = [stage for stage in self.stages if stage.name == name]
        return parts[0].first_token, parts[-1].first_token + parts[-1].tokens


def _scale(plan: RunPlan, step: int) -> float:
    """The factor of a stage, reached from that of the one before in a straight line over `transition_tokens`."""
    stage = plan.stage_of_step(step)
    scale, length = stage.lr_scale, stage.stage.transition_tokens
    first = stage
    # A stage that was changed on the way is several, of which the first with this factor begins the transition.
    while first.number and (before := plan.stages[first.number - 1]).name == stage.name and before.lr_scale == scale:
        first = before
    done = plan.tokens_at(step + 1) - first.first_token
    if not first.number or done >= length:
        return scale
    origin = plan.stages[first.number - 1].lr_scale
    return origin + (scale - origin) * done / length


def _decayed(style: str, progress: float, peak: float, floor: float) -> float:
    """The value after a share `progress` of a decay from `peak` to `floor`."""
    if style == "geometric":
        return float(peak * (floor / peak) ** progress)
    remaining = {
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "minus_sqrt": 1 - math.sqrt(progress),
        "exponential_megatron": 2 * 0.5**progress - 1,
    }[style]
    return float(floor + (peak - floor) * remaining)
