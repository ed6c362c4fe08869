"""The learning rate as a pure function of the step: nothing to save, nothing to restart."""

import math

from megatron_ext.config import ConstantSchedule, RunConfig, WsdSchedule


def learning_rate(run: RunConfig, step: int) -> float:
    """The learning rate of `step`, counted from 0.

    The warmup reaches the peak with its last step, a decay reaches `min_lr` with its last step.
    """
    schedule, peak = run.schedule, run.optimizer.lr
    if step < schedule.warmup_iters:
        return peak * (step + 1) / schedule.warmup_iters
    if isinstance(schedule, ConstantSchedule):
        return peak
    if isinstance(schedule, WsdSchedule):
        start, length = run.train.train_iters - schedule.wsd_decay_iters, schedule.wsd_decay_iters
        style = schedule.decay_style
    else:
        start = schedule.warmup_iters
        length = (schedule.decay_iters or run.train.train_iters) - start
        style = schedule.kind
    progress = min(max((step + 1 - start) / max(length, 1), 0.0), 1.0)
    return _decayed(style, progress, peak, schedule.min_lr)


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
