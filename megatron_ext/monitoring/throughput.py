"""How fast a run is: tokens and model FLOPs of the steps of its plan over the time that they took."""

import time
from dataclasses import dataclass

from megatron_ext.config import RunConfig
from megatron_ext.data.stream.plan import RunPlan
from megatron_ext.monitoring.clock import Clock
from megatron_ext.planning.flops import training_flops_per_token


@dataclass(frozen=True)
class Throughput:
    """Of the steps since the report before."""

    seconds_per_step: float
    tokens_per_second: float
    """Over all devices."""
    tflops_per_device: float
    """Model FLOPs."""
    mfu: float | None
    """Share of the device's dense peak; None where that is not known."""


class Pace:
    """Measures the throughput from report to report, and how long the rest takes.

    Args:
        peak_tflops: dense peak of a device, as far as it is known.
        last: the step after which the job ends.
    """

    def __init__(
        self,
        run: RunConfig,
        plan: RunPlan,
        clock: Clock,
        *,
        devices: int,
        peak_tflops: float | None,
        iteration: int,
        last: int,
    ) -> None:
        self._plan, self._clock, self._devices, self._peak, self._last = plan, clock, devices, peak_tflops, last
        lengths = {stage.sequence_length for stage in plan.stages}
        self._flops = {
            length: training_flops_per_token(run.model, length, run.adapters, run.task) for length in lengths
        }
        """Of a token, by the sequence length."""
        self._last_iteration, self._last_time = iteration, clock.now()
        self._passed: list[tuple[int, int]] = []
        """Steps since then that were passed over."""
        self._first: tuple[int, float] | None = None
        """Step and time of the first report: what came before it was warming up."""

    def measure(self, iteration: int) -> Throughput:
        """The throughput since the last call, with `iteration` steps done."""
        now, last = self._clock.now(), self._last_iteration
        elapsed = now - self._last_time
        self._last_iteration, self._last_time = iteration, now
        passed, self._passed = self._passed, []
        steps, tokens, work = iteration - last, self._tokens(last, iteration), self._work(last, iteration)
        for first, end in passed:
            steps, tokens, work = (
                steps - (end - first),
                tokens - self._tokens(first, end),
                work - self._work(first, end),
            )
        tflops = work / elapsed / self._devices / 1e12
        mfu = tflops / self._peak if self._peak else None
        return Throughput(elapsed / max(steps, 1), tokens / elapsed, tflops, mfu)

    def pass_over(self, first: int, last: int) -> None:
        """Nothing was computed in the steps from `first` to before `last`."""
        self._passed.append((first, last))

    def seconds_left(self, iteration: int, seconds_per_step: float) -> float | None:
        """Seconds until the last step of this job, validating and saving as until now; None after it."""
        now, done, seconds = time.perf_counter(), self._work(iteration - 1, iteration), seconds_per_step
        if self._first is None:
            self._first = iteration, now
        elif iteration > self._first[0]:
            done, seconds = self._work(self._first[0], iteration), now - self._first[1]
        return self._work(iteration, self._last) * seconds / done if iteration < self._last else None

    def _tokens(self, first: int, last: int) -> int:
        return self._plan.tokens_at(last) - self._plan.tokens_at(first)

    def _work(self, first: int, last: int) -> float:
        """Model FLOPs of the steps from `first` to before `last`, over all devices."""
        work = 0.0
        for stage in self._plan.stages:
            begin, end = max(first, stage.first_step), min(last, stage.first_step + stage.steps)
            if begin < end:
                work += self._tokens(begin, end) * self._flops[stage.sequence_length]
        return work
