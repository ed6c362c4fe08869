"""The steps of a stage by the size of their global batch: first what is left of a batch-size ramp, then all alike.

As Megatron-LM's --rampup-batch-size, a ramp counts samples: what a stage reads does not depend on how it is cut into
steps.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.config import TrainConfig


@dataclass(frozen=True)
class Span:
    """Steps of one batch size."""

    global_batch_size: int
    steps: int

    @property
    def samples(self) -> int:
        """What they read."""
        return self.steps * self.global_batch_size


def ramp_left(train: TrainConfig, done: int) -> list[Span]:
    """The part of the batch-size ramp that comes after `done` steps."""
    left = []
    for step in train.batch_size_ramp:
        over = min(done, step.num_steps)
        done -= over
        if over < step.num_steps:
            left.append(Span(step.global_batch_size, step.num_steps - over))
    return left


def spans_of(ramp: Sequence[Span], global_batch_size: int, *, samples: int = 0, steps: int = 0) -> list[Span]:
    """The steps in which `samples` are read, the last one whole; or `steps` steps, where no samples are given.

    Args:
        ramp: what comes before batches of `global_batch_size`, as far as there is something left for it.
    """
    spans = []
    for span in [*ramp, Span(global_batch_size, sys.maxsize)]:
        left = math.ceil(samples / span.global_batch_size) if samples else steps
        taken = Span(span.global_batch_size, min(left, span.steps))
        if taken.steps <= 0:
            break
        spans.append(taken)
        steps -= taken.steps
        if samples and (samples := samples - taken.samples) <= 0:
            break
    return spans
