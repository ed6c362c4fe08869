"""The plan of a run's data: which stage each step belongs to, and how much of each source has been read at any point.

A plan is made once, by a pure function of the configuration, the sources' sizes and what the checkpoint has read; the
rest is arithmetic. This file imports neither torch nor megatron, so that tools answer at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_ext.config.data import Stage
from megatron_ext.data.stream.order import WINDOW, sample_at
from megatron_ext.data.stream.pattern import Pattern, mix_pattern, take_pattern
from megatron_ext.data.stream.progress import Part, Progress


@dataclass(frozen=True)
class PlannedSource:
    """A source that the run reads, or has read."""

    id: str
    tokens: int | None
    """Tokens of its file; None where it is no longer in the configuration."""
    fingerprint: str = ""
    """Of its files."""
    order: str = "shuffled"
    """shuffled or file."""
    window: int = WINDOW
    """Units whose shorter samples are mixed with each other."""

    def epoch_tokens(self, unit: int) -> int:
        """Tokens read of it in one epoch: whole units; 0 where its size is not known."""
        return (self.tokens - 1) // unit * unit if self.tokens else 0


@dataclass(frozen=True)
class StagePlan:
    """A stretch of the run in which nothing changes. A stage that was changed on the way has several, of one name."""

    number: int
    """Its place in the plan, from 0."""
    name: str
    first_step: int
    """Steps before it."""
    steps: int
    first_sample: int
    """Samples of the run before it."""
    samples: int
    first_token: int
    """Tokens of the run before it."""
    tokens: int
    sequence_length: int
    global_batch_size: int
    """Samples a step; where it was changed on the way in a stretch that is over, its mean."""
    micro_batch_size: int
    lr_scale: float
    rotary_base: float | None
    """None where it is the model's own."""
    counts: Mapping[str, int]
    """Samples it reads of each source, by id."""
    skipped: Mapping[str, int]
    """Tokens of each source that are passed over before it, because the sequence length changed within a window."""
    stage: Stage
    """As the configuration has it."""
    offset: int
    """Samples of the stage's pattern that were read before this stretch."""
    starts: Mapping[str, int]
    """Tokens of each source's order (read and skipped) before the first sample of the pattern."""
    taken: Mapping[str, int]
    """With `take`: the samples of each source in the whole pattern."""

    complete: bool = True
    """Nothing of the stage is left behind it; False where it was ended early."""

    @cached_property
    def pattern(self) -> Pattern:
        """Which source, of those in `starts`, each sample is from."""
        return pattern_of(self.stage, list(self.starts), self.taken)

    def counts_of(self, samples: int) -> dict[str, int]:
        """How many of the first `samples` of this stretch each source has, by id."""
        before, after = self.pattern.counts(self.offset), self.pattern.counts(self.offset + samples)
        return {name: b - a for name, a, b in zip(self.starts, before, after, strict=True)}


@dataclass(frozen=True)
class Place:
    """Where a sample is read from."""

    source: str
    """Id of the source."""
    epoch: int
    unit: int
    start: int
    """Number of its first token in the source's file."""
    length: int
    """Tokens; the label of the last is the token behind it."""


@dataclass(frozen=True)
class Consumed:
    """What has been read of a source."""

    samples: int
    tokens: int
    epochs: float
    """0 where its size is not known."""
    skipped: int = 0
    """Tokens passed over where the sequence length changed."""


@dataclass(frozen=True)
class RunPlan:
    """All stages of a run, without gaps: steps, samples and tokens are counted from the run's beginning."""

    stages: tuple[StagePlan, ...]
    sources: tuple[PlannedSource, ...]
    """Sorted by id; with order 1 as data.train has them. A sample's source number counts these."""
    unit: int
    """Tokens that are read together, whatever the sequence length."""
    seed: int
    order: int = 2
    """Version of the order of samples."""

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.stages[-1].first_step + self.stages[-1].steps

    @property
    def total_samples(self) -> int:
        """Samples of the whole run."""
        return self.stages[-1].first_sample + self.stages[-1].samples

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.stages[-1].first_token + self.stages[-1].tokens

    def stage_of_step(self, step: int) -> StagePlan:
        """The stage of `step`, counted from 0.

        Raises:
            ValueError: the run has no such step.
        """
        return self._holding("step", step, self.total_steps)

    def stage_of_sample(self, sample: int) -> StagePlan:
        """The stage of `sample`, counted from 0.

        Raises:
            ValueError: the run has no such sample.
        """
        return self._holding("sample", sample, self.total_samples)

    def ends(self, stage: StagePlan) -> bool:
        """Whether no other stretch of the same stage follows."""
        return stage is self.stages[-1] or self.stages[stage.number + 1].name != stage.name

    def samples_at(self, step: int) -> int:
        """Samples of the run before `step`, which may be the one after its last."""
        if step == self.total_steps:
            return self.total_samples
        stage = self.stage_of_step(step)
        return stage.first_sample + (step - stage.first_step) * stage.samples // stage.steps

    def tokens_at(self, step: int) -> int:
        """Tokens of the run before `step`, which may be the one after its last."""
        if step == self.total_steps:
            return self.total_tokens
        stage = self.stage_of_step(step)
        return stage.first_token + (self.samples_at(step) - stage.first_sample) * stage.sequence_length

    def consumed(self, sample: int) -> dict[str, Consumed]:
        """What has been read of each source before `sample`, by id."""
        samples, tokens, skipped = ({source.id: 0 for source in self.sources} for _ in range(3))
        for part in self.progress(sample).parts:
            for name, count in part.counts.items():
                samples[name] += count
                tokens[name] += count * part.sequence_length
                skipped[name] += part.skipped.get(name, 0)
        epochs = {source.id: source.epoch_tokens(self.unit) for source in self.sources}
        return {
            name: Consumed(
                samples[name], tokens[name], tokens[name] / epochs[name] if epochs[name] else 0.0, skipped[name]
            )
            for name in samples
        }

    def progress(self, sample: int) -> Progress:
        """What was read before `sample`, as a checkpoint keeps it."""
        parts = []
        for stage in self.stages:
            if (read := min(sample - stage.first_sample, stage.samples)) <= 0:
                break
            parts.append(
                Part(
                    stage=stage.stage,
                    sequence_length=stage.sequence_length,
                    global_batch_size=stage.global_batch_size,
                    steps=read * stage.steps // stage.samples,
                    samples=read,
                    complete=self.ends(stage) and read == stage.samples and stage.complete,
                    offset=stage.offset,
                    counts=stage.counts_of(read),
                    starts=stage.starts,
                    skipped=stage.skipped,
                    taken=stage.taken,
                )
            )
        read_of = {name for part in parts for name in part.starts}
        known = [source for source in self.sources if source.id in read_of]
        marks, orders = ({s.id: getattr(s, key) for s in known} for key in ("fingerprint", "order"))
        windows = {source.id: source.window for source in known}
        return Progress(self.order, self.unit, self.seed, marks, orders, tuple(parts), windows)

    def place(self, sample: int) -> Place:
        """Where `sample` is read from, in order 2.

        Raises:
            ValueError: the plan has no such sample.
        """
        stage = self.stage_of_sample(sample)
        at = stage.offset + sample - stage.first_sample
        number = stage.pattern.source(at)
        name, length = list(stage.starts)[number], stage.sequence_length
        source = self._by_id[name]
        position = stage.starts[name] // length + stage.pattern.count(number, at)
        units, k = source.epoch_tokens(self.unit) // self.unit, self.unit // length
        epoch, within = divmod(position, units * k)
        if source.order == "file":
            unit, part = divmod(within, k)
        else:
            unit, part = sample_at(f"{self.seed}:{name}", epoch, units, k, within, source.window)
        return Place(name, epoch, unit, unit * self.unit + part * length, length)

    def source_counts(self, sample: int) -> list[int]:
        """Samples of each source before `sample`, in the order of `sources`."""
        counted = np.zeros(len(self.sources), dtype=np.int64)
        for stage in self.stages:
            if (read := min(sample - stage.first_sample, stage.samples)) <= 0:
                break
            for name, count in (stage.counts if read == stage.samples else stage.counts_of(read)).items():
                counted[self.numbers[name]] += count
        found: list[int] = counted.tolist()
        return found

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each source, by id."""
        return {source.id: number for number, source in enumerate(self.sources)}

    @cached_property
    def _by_id(self) -> dict[str, PlannedSource]:
        return {source.id: source for source in self.sources}

    def _holding(self, what: str, at: int, total: int) -> StagePlan:
        if not 0 <= at < total:
            raise ValueError(f"{what} {at} is none of the plan's {total}")
        return next(s for s in reversed(self.stages) if getattr(s, f"first_{what}") <= at)


def pattern_of(stage: Stage, sources: list[str], taken: Mapping[str, int]) -> Pattern:
    """The pattern of a stage over `sources`, of which it takes `taken`, or a mix by weight."""
    if taken:
        return take_pattern([taken[name] for name in sources])
    return mix_pattern([stage.mix[name] for name in sources])
