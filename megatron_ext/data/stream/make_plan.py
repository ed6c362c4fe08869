"""Makes the plan of a run's data out of configuration, the sizes of its sources and what has been read already."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_ext.config import DataConfig, TrainConfig
from megatron_ext.config.data import Stage, source_ids
from megatron_ext.data.stream.continuing import Continued, changed, continue_stages, same_pattern
from megatron_ext.data.stream.order import window_of
from megatron_ext.data.stream.pattern import PERIOD, Pattern, shares_of
from megatron_ext.data.stream.plan import PlannedSource, RunPlan, StagePlan, pattern_of
from megatron_ext.data.stream.progress import Part, Progress
from megatron_ext.data.stream.spans import Span, ramp_left, spans_of
from megatron_ext.errors import CheckpointError, ConfigError

_MOST_SAMPLES = 1 << 36
"""Of a stage: 2.8e14 tokens at 4096, more than there are to read."""


@dataclass(frozen=True)
class SourceSize:
    """What the plan must know of a source's files."""

    tokens: int
    fingerprint: str = ""


def make_plan(
    data: DataConfig, train: TrainConfig, sizes: Mapping[str, SourceSize], progress: Progress | None = None
) -> RunPlan:
    """The plan of a run that has read `progress`.

    Args:
        sizes: of each source of the configuration, by id.

    Raises:
        ConfigError: the stages cannot be read from these sources; every fault at once.
        CheckpointError: what was read already is not the beginning of these stages; every fault of either kind.
    """
    planner = _Planner(data, train, sizes, progress)
    planner.check()
    planner.plan()
    if planner.mismatches:
        raise CheckpointError("\n".join([*planner.mismatches, *planner.faults]))
    if planner.faults:
        raise ConfigError("\n".join(planner.faults))
    return RunPlan(_stage_plans(planner.parts, train), planner.sources, planner.unit, train.seed, data.order)


def stages_of(data: DataConfig, train: TrainConfig) -> list[Stage]:
    """The stages of a run; a blend without stages is one, named train."""
    if data.stages:
        return list(data.stages)
    ids = source_ids(data.train)
    mix = {name: source.weight for name, source in zip(ids, data.train, strict=True)}
    return [Stage(name="train", mix=mix, steps=train.train_iters)]


class _Planner:
    """Lays one stretch behind the other: those that were read, and those that are to come."""

    def __init__(
        self, data: DataConfig, train: TrainConfig, sizes: Mapping[str, SourceSize], progress: Progress | None
    ) -> None:
        self._data, self._train, self._sizes = data, train, sizes
        self._progress = progress if progress is not None and progress.parts else None
        self._stages = stages_of(data, train)
        self.parts: list[Part] = []
        self.faults: list[str] = []
        self.mismatches: list[str] = []
        longest = max(self._length(stage) for stage in self._stages)
        self.unit = data.unit_tokens or (self._progress.unit if self._progress else longest)
        self.sources = self._planned_sources()
        self._by_id = {source.id: source for source in self.sources}
        self._behind = {source.id: 0 for source in self.sources}
        self._lengths: dict[str, int] = {}

    def check(self) -> None:
        """Note everything that keeps the configuration from being planned, or from going on with what was read."""
        self._check_units()
        if self._data.order == 2:
            self._check_sources()
        if self._progress is None:
            return
        for key, then, now in (
            ("train.seed", self._progress.seed, self._train.seed),
            ("order of samples (1 with data.cache_dir, 2 without)", self._progress.order, self._data.order),
        ):
            if then != now:
                self.mismatches.append(f"{key}: {then} in the checkpoint, {now} in this run")

    def plan(self) -> None:
        """Plan what was read, the rest of the stage under way, and what follows."""
        continued = Continued(coming=self._stages)
        if self._progress is not None:
            if self._progress.order != self._data.order:
                return  # its sources have other names
            for part in self._progress.parts:
                self._append(part)
            continued = continue_stages(self._stages, self._progress, self._length)
            self.mismatches += continued.faults
        current = [continued.current] if continued.current and not self._is_over(continued.current) else []
        for stage in [*current, *continued.coming]:
            if wrong := [name for name, weight in stage.mix.items() if weight <= 0]:
                self.faults.append(f"stage {stage.name!r}: the weight of {', '.join(wrong)} must be greater than 0")
            if unknown := [name for name in (*stage.mix, *stage.take) if name not in self._sizes]:
                known = ", ".join(self._sizes)
                self.faults.append(f"stage {stage.name!r} reads {', '.join(unknown)}, none of the sources ({known})")
        if self.faults or self.mismatches:
            return
        for stage in current:
            self._continue(stage)
        for stage in continued.coming:
            self._begin(stage, [])
        total = sum(part.steps for part in self.parts)
        if self._data.stages and self._train.train_iters not in (0, total):
            self.faults.append(
                f"train.train_iters = {self._train.train_iters}: data.stages are {total:,} steps; leave it out"
            )

    # Sources and units

    def _planned_sources(self) -> tuple[PlannedSource, ...]:
        """Those of the configuration that are there, and those that were read and are no longer in it."""
        staged = self._data.sources
        windows = self._progress.windows if self._progress else {}
        found = {}
        for name in staged or source_ids(self._data.train):
            if (size := self._sizes.get(name)) is not None:
                window = windows.get(name) or window_of((size.tokens - 1) // self.unit)
                order = staged[name].order if staged else "shuffled"
                found[name] = PlannedSource(name, size.tokens, size.fingerprint, order, window)
        if self._data.order == 1:
            return tuple(found.values())
        if self._progress:
            for name, mark in self._progress.fingerprints.items():
                found.setdefault(name, PlannedSource(name, None, mark, self._progress.orders[name], windows[name]))
        return tuple(found[name] for name in sorted(found))

    def _check_units(self) -> None:
        if self._progress and self.unit != self._progress.unit and self._data.order == 2:
            self.mismatches.append(
                f"data.unit_tokens: {self._progress.unit} in the checkpoint, {self.unit} in this run; it is fixed when "
                "a run begins"
            )
        for stage in self._stages:
            if self.unit % self._length(stage):
                self.faults.append(
                    f"stage {stage.name!r}: sequence_length = {self._length(stage)} does not divide the {self.unit} "
                    "tokens of a unit, which are fixed when a run begins; take a divisor, or, beginning a run, "
                    "set data.unit_tokens"
                )

    def _check_sources(self) -> None:
        """Note sources that are too short, twice there, or others than those that were read."""
        seen: dict[str, str] = {}
        for source in self.sources:
            if source.tokens is not None and source.tokens <= self.unit:
                self.faults.append(
                    f"source {source.id!r}: its {source.tokens:,} tokens are not one unit of {self.unit} (the longest "
                    "sequence of the run) and the token after it"
                )
            if source.fingerprint and (other := seen.setdefault(source.fingerprint, source.id)) != source.id:
                self.faults.append(
                    f"sources {other!r} and {source.id!r} are the same data: what is read of one would be read again "
                    "of the other; keep one, under the id that it had"
                )
            if self._progress is None or source.id not in self._progress.fingerprints:
                continue
            if source.fingerprint != (mark := self._progress.fingerprints[source.id]):
                self.mismatches.append(
                    f"source {source.id!r}: its files are not those that the run has read from (fingerprint {mark} in "
                    f"the checkpoint, {source.fingerprint} in this run); other data is a source with another id"
                )
            if source.order != (order := self._progress.orders[source.id]):
                self.mismatches.append(
                    f"source {source.id!r}: order: {order} in the checkpoint, {source.order} in this run"
                )

    # Stretches

    def _continue(self, stage: Stage) -> None:
        """Plan the rest of the stage under way, with the pattern it has, or with another from here on."""
        read = [part for part in self.parts if part.stage.name == stage.name]
        last = read[-1]
        if not same_pattern(stage, self._length(stage), last):
            if not self._begin(stage, read):
                self._end(stage)
        elif spans := self._spans_left(stage, read):
            self._append_spans(replace(last, stage=stage, offset=last.offset + last.samples, skipped={}), spans)
        else:
            self._end(stage)

    def _is_over(self, stage: Stage) -> bool:
        """Whether all of the stage that was read last was read, and it is what it was: its sources may be gone."""
        return self.parts[-1].complete and not changed(stage, self.parts[-1], self._length)

    def _end(self, stage: Stage) -> None:
        """Note that nothing is left of the stage under way: it may end now, but not have been another."""
        last = self.parts[-1]
        if last.complete:
            self.mismatches += changed(stage, last, self._length)
        else:
            self.parts[-1] = replace(last, stage=stage, complete=True)

    def _begin(self, stage: Stage, read: Sequence[Part]) -> int:
        """Plan what is left of a stage of which `read` was read, with a pattern of its own; return its steps."""
        length = self._length(stage)
        taken = self._take_left(stage, read)
        spans = self._spans(stage, sum(taken.values())) if stage.take else self._spans_left(stage, read)
        if not spans:
            return 0
        names = list(taken) if stage.take else self._mix_order(stage)
        skipped = {name: tokens for name in names if (tokens := self._skip(name, length))}
        part = Part(
            stage=stage,
            sequence_length=length,
            global_batch_size=0,
            steps=0,
            samples=0,
            complete=True,
            offset=0,
            counts={},
            starts={name: self._behind[name] + skipped.get(name, 0) for name in names},
            skipped=skipped,
            taken=taken,
        )
        self._append_spans(part, spans)
        return sum(span.steps for span in spans)

    def _append_spans(self, part: Part, spans: Sequence[Span]) -> None:
        """Append what is to come of a stage, a part for each batch size; `part` says how it begins."""
        pattern = pattern_of(part.stage, list(part.starts), part.taken)
        for span in spans:
            counts = _counts(pattern, part.offset, span.samples, list(part.starts))
            batch, steps = span.global_batch_size, span.steps
            added = replace(part, global_batch_size=batch, steps=steps, samples=span.samples, counts=counts)
            added = replace(added, complete=span is spans[-1])
            self._append(added)
            part = replace(added, offset=added.offset + added.samples, skipped={})

    def _mix_order(self, stage: Stage) -> list[str]:
        """The sources of a mix: of equal ones the first is read first, so that their order in a file means nothing."""
        for name, share in zip(stage.mix, shares_of(list(stage.mix.values())), strict=True):
            if share * PERIOD < 1:
                self.faults.append(
                    f"stage {stage.name!r}: a weight of {share:.3g} for {name!r} is less than one of {PERIOD:,} samples"
                )
        if self._data.order == 1:
            return list(stage.mix)
        return sorted(stage.mix, key=lambda name: (-stage.mix[name], name))

    def _take_left(self, stage: Stage, read: Sequence[Part]) -> dict[str, int]:
        """Samples of each source that a stage has yet to take, most first."""
        length, left = self._length(stage), {}
        for name, amount in stage.take.items():
            if amount.epochs is not None:
                wanted = amount.epochs * self._by_id[name].epoch_tokens(self.unit)
            else:
                wanted = amount.tokens if amount.tokens is not None else (amount.samples or 0) * length
            done = sum(part.counts.get(name, 0) * part.sequence_length for part in read)
            left[name] = round((wanted - done) / length)
            if left[name] < 0:
                self.faults.append(
                    f"stage {stage.name!r} takes {wanted:,.0f} tokens of {name!r}, and has read {done:,} already"
                )
            elif not read and not left[name]:
                self.faults.append(
                    f"stage {stage.name!r} takes {wanted:,.0f} tokens of {name!r}: not one sample of {length}"
                )
        return {name: left[name] for name in sorted(left, key=lambda name: (-left[name], name)) if left[name] > 0}

    def _spans_left(self, stage: Stage, read: Sequence[Part]) -> list[Span]:
        """What is left of a stage of which `read` was read."""
        steps = samples = 0
        if stage.steps is not None:
            left = steps = stage.steps - sum(part.steps for part in read)
        elif stage.tokens is not None:
            left = samples = math.ceil((stage.tokens - sum(part.tokens for part in read)) / self._length(stage))
        elif stage.samples is not None:
            left = samples = stage.samples - sum(part.samples for part in read)
        else:
            left = samples = sum(read[-1].taken.values()) - read[-1].offset - read[-1].samples
        # The last step may have read beyond what the stage has, which is then rounded up to it.
        beyond = 0 if stage.steps is not None or not read else read[-1].global_batch_size - 1
        if left < -beyond and not stage.take:
            over = -left if stage.steps is not None else -left // self._batch(stage)
            self.faults.append(
                f"stage {stage.name!r} is {over:,} steps shorter than what was read of it already; to end it now, "
                "leave it out"
            )
        return self._spans(stage, samples, steps)

    def _spans(self, stage: Stage, samples: int, steps: int = 0) -> list[Span]:
        """The steps in which `samples`, or that many steps, are read: of the ramp first, where that is not over."""
        if samples <= 0 and steps <= 0:
            return []
        if (most := max(samples, steps * self._batch(stage))) > _MOST_SAMPLES:
            self.faults.append(
                f"stage {stage.name!r} has {min(most, 10**300):.3g} samples of {self._length(stage)} tokens: no run "
                "reads so many; is a count of tokens one of steps, or of samples?"
            )
            return []
        done = sum(part.steps for part in self.parts)
        ramp = ramp_left(self._train, done) if stage.name == self._stages[0].name else []
        spans = spans_of(ramp, self._batch(stage), samples=samples, steps=steps)
        if sum(span.steps for span in spans) < sum(span.steps for span in ramp):
            self.faults.append(
                f"train.batch_size_ramp is longer than the {sum(span.steps for span in spans):,} steps that stage "
                f"{stage.name!r} has for it; it is over with the first stage"
            )
        return spans

    def _skip(self, name: str, length: int) -> int:
        """Tokens passed over where a source goes on in samples of another length: the rest of a window."""
        behind, before = self._behind[name], self._lengths.get(name, length)
        if before == length:
            return 0
        source = self._by_id[name]
        epoch = source.epoch_tokens(self.unit)
        within = behind % epoch
        step = length if source.order == "file" else source.window * self.unit
        return min(math.ceil(within / step) * step, epoch) - within

    def _append(self, part: Part) -> None:
        for name, count in part.counts.items():
            self._behind[name] += count * part.sequence_length + part.skipped.get(name, 0)
            self._lengths[name] = part.sequence_length
        self.parts.append(part)

    def _length(self, stage: Stage) -> int:
        return stage.sequence_length or self._data.sequence_length

    def _batch(self, stage: Stage) -> int:
        return stage.global_batch_size or self._train.global_batch_size


def _counts(pattern: Pattern, offset: int, samples: int, names: Sequence[str]) -> dict[str, int]:
    """How many of the samples behind `offset` each source has."""
    before, after = pattern.counts(offset), pattern.counts(offset + samples)
    return {name: b - a for name, a, b in zip(names, before, after, strict=True)}


def _stage_plans(parts: Sequence[Part], train: TrainConfig) -> tuple[StagePlan, ...]:
    """The stretches as a plan; what goes on as it was is one with what was read."""
    plans: list[StagePlan] = []
    step = sample = token = 0
    for part in _joined(parts):
        plans.append(
            StagePlan(
                number=len(plans),
                name=part.stage.name,
                first_step=step,
                steps=part.steps,
                first_sample=sample,
                samples=part.samples,
                first_token=token,
                tokens=part.tokens,
                sequence_length=part.sequence_length,
                global_batch_size=part.global_batch_size,
                micro_batch_size=part.stage.micro_batch_size or train.micro_batch_size,
                lr_scale=part.stage.lr_scale,
                rotary_base=part.stage.rotary_base,
                counts=part.counts,
                skipped=part.skipped,
                stage=part.stage,
                offset=part.offset,
                starts=part.starts,
                taken=part.taken,
                complete=part.complete,
            )
        )
        step, sample, token = step + part.steps, sample + part.samples, token + part.tokens
    return tuple(plans)


def _joined(parts: Sequence[Part]) -> list[Part]:
    joined: list[Part] = []
    for part in parts:
        if joined and part.offset and _goes_on(joined[-1], part):
            last = joined.pop()
            counts = {name: last.counts[name] + count for name, count in part.counts.items()}
            steps, samples = last.steps + part.steps, last.samples + part.samples
            part = replace(last, stage=part.stage, complete=part.complete, steps=steps, samples=samples, counts=counts)
        joined.append(part)
    return joined


def _goes_on(last: Part, part: Part) -> bool:
    """Whether nothing changes from one part to the other."""
    return (
        part.stage.name == last.stage.name
        and part.offset == last.offset + last.samples
        and part.global_batch_size == last.global_batch_size
        and (part.stage.lr_scale, part.stage.rotary_base) == (last.stage.lr_scale, last.stage.rotary_base)
    )
