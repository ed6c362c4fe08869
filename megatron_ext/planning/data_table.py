"""The plan of a run's data as people read it: a table of stages and sources, and what is worth a second look."""

from collections.abc import Callable, Mapping
from itertools import pairwise

from megatron_ext.config import DataConfig
from megatron_ext.config.data import DEFAULT_MAX_EPOCHS
from megatron_ext.data.stream.pattern import PERIOD
from megatron_ext.data.stream.plan import RunPlan, StagePlan
from megatron_ext.planning.amounts import short_number

_HANDFUL = 50
"""Steps' worth of samples below which a source is hardly seen."""
_PASSED_OVER = 0.01
"""Of a source, above which what is passed over is worth a warning."""
_ROUNDED_UP = 0.01
"""Of what a stage takes, above which it is worth a warning that its last step reads more."""
_LARGE_SHARE = 0.1
"""Of a stage's tokens, from which on a language is missed when it disappears."""

RateAt = Callable[[int], float]
"""The learning rate of a step, counted from 0."""


def plan_table(plan: RunPlan, rate_at: RateAt | None = None) -> list[str]:
    """Each stage with its steps and tokens, each of its sources with tokens and epochs, and the total.

    Args:
        rate_at: for the learning rate at both ends of each stage.
    """
    lines = []
    for stage in plan.stages:
        lines += [_headline(plan, stage, rate_at), *_source_lines(plan, stage)]
    used = plan.consumed(plan.total_samples)
    lines.append(f"{'in all':<14} {plan.total_steps:>9,} steps  {short_number(plan.total_tokens):>8} tokens")
    for name, use in used.items():
        epochs = f"{use.epochs:>9,.3f} epochs" if use.epochs else f"{'':>16}"
        skipped = f"  {short_number(use.skipped)} passed over" if use.skipped else ""
        lines.append(f"  {name:<27} {short_number(use.tokens):>9} tokens  {epochs}{skipped}")
    return lines


def _headline(plan: RunPlan, stage: StagePlan, rate_at: RateAt | None) -> str:
    batch = f"{stage.global_batch_size:,} x {stage.sequence_length:,}"
    line = f"{stage.name:<14} {stage.steps:>9,} steps  {short_number(stage.tokens):>8} tokens  {batch}"
    if rate_at is not None:
        last = stage.first_step + stage.steps - 1
        line += f"  lr {rate_at(stage.first_step):.3g} to {rate_at(last):.3g}"
    if stage.rotary_base is not None:
        line += f"  rotary base {stage.rotary_base:,.0f}"
    return f"{line}  ended early" if plan.ends(stage) and not stage.complete else line


def _source_lines(plan: RunPlan, stage: StagePlan) -> list[str]:
    """Tokens, epochs and share of each source in a stage."""
    lines = []
    sizes = {source.id: source.epoch_tokens(plan.unit) for source in plan.sources}
    for name, count in stage.counts.items():
        tokens = count * stage.sequence_length
        epochs = f"{tokens / sizes[name]:>9,.3f} epochs" if sizes[name] else f"{'':>16}"
        skipped = stage.skipped.get(name, 0)
        note = f"  {short_number(skipped)} passed over: other sequence length" if skipped else ""
        share = 100 * tokens / stage.tokens
        lines.append(f"  {name:<27} {short_number(tokens):>9} tokens  {epochs}  {share:>5.1f}%{note}")
    return lines


def plan_warnings(plan: RunPlan, data: DataConfig) -> list[str]:
    """What of the plan is seldom meant."""
    found = [*_misjudged(plan, data), *_repeated(plan, data), *_passed_over(plan), *_forgotten(plan, data)]
    return [*found, *_handfuls(plan), *_coarse(plan), *_rounded_up(plan), *_turned_back(plan), *_unread(plan, data)]


def _misjudged(plan: RunPlan, data: DataConfig) -> list[str]:
    """A source that has far more or fewer tokens than the configuration says."""
    stated = {name: source.tokens for name, source in data.sources.items()}
    return [
        f"data.sources.{source.id}.tokens = {tokens:,.0f}, but its files have {source.tokens:,}"
        for source in plan.sources
        if source.tokens and (tokens := stated.get(source.id)) and abs(source.tokens - tokens) > tokens / 10
    ]


def _repeated(plan: RunPlan, data: DataConfig) -> list[str]:
    warnings = []
    for name, use in plan.consumed(plan.total_samples).items():
        most = data.sources[name].max_epochs if name in data.sources else DEFAULT_MAX_EPOCHS
        if use.epochs > most:
            warnings.append(
                f"{name} is read {use.epochs:,.3g} times, more than max_epochs = {most:g}; repeated data is worth ever "
                "less"
            )
    return warnings


def _passed_over(plan: RunPlan) -> list[str]:
    """A source of which much is not read because the sequence length changes in the middle of a window of it."""
    epochs = {source.id: source.epoch_tokens(plan.unit) for source in plan.sources}
    return [
        f"of {name} {use.skipped:,} tokens are passed over where the sequence length changes, "
        f"{100 * use.skipped / epochs[name]:.3g}% of it: with whole epochs of it before (take) none are"
        for name, use in plan.consumed(plan.total_samples).items()
        if epochs[name] and use.skipped > _PASSED_OVER * epochs[name]
    ]


def _forgotten(plan: RunPlan, data: DataConfig) -> list[str]:
    """A language that was read a lot and is missing later is forgotten, first in what the model answers in."""
    shares = [_languages(stage, data) for stage in plan.stages]
    warnings, said = [], set()
    for stage, share in zip(plan.stages, shares, strict=True):
        for language in [name for name, part in share.items() if part >= _LARGE_SHARE and name not in said]:
            later = range(stage.number + 1, len(plan.stages))
            if gone := dict.fromkeys(plan.stages[n].name for n in later if language not in shares[n]):
                said.add(language)
                warnings.append(
                    f"{language} is {100 * share[language]:.3g}% of stage {stage.name} and missing in {', '.join(gone)}"
                    ": models forget what they no longer read; 5 to 20% of it keeps it"
                )
    return warnings


def _languages(stage: StagePlan, data: DataConfig) -> Mapping[str, float]:
    """The share of each language of a stage."""
    found: dict[str, float] = {}
    for name, count in stage.counts.items():
        source = data.sources.get(name)
        language = source.language if source is not None and source.language is not None else name
        found[language] = found.get(language, 0.0) + count / stage.samples
    return found


def _handfuls(plan: RunPlan) -> list[str]:
    """A source that the whole run sees for a handful of steps leaves next to nothing behind."""
    steps: dict[str, float] = {}
    for stage in plan.stages:
        for name, count in stage.counts.items():
            steps[name] = steps.get(name, 0.0) + count / stage.global_batch_size
    return [
        f"{name} fills {count:,.3g} of {plan.total_steps:,} steps: hardly seen, unless it is repeated"
        for name, count in steps.items()
        if count < _HANDFUL and count < plan.total_steps / 100
    ]


def _coarse(plan: RunPlan) -> list[str]:
    return [
        f"the weight of {name} in stage {stage.name} is {PERIOD * count / stage.samples:.3g} of {PERIOD:,} samples: "
        "its share is rounded to that"
        for stage in plan.stages
        if stage.stage.mix
        for name, count in stage.counts.items()
        if stage.samples >= PERIOD and PERIOD * count / stage.samples < 100
    ]


def _rounded_up(plan: RunPlan) -> list[str]:
    """Exact amounts that whole steps make much larger."""
    warnings = []
    for stage in plan.stages:
        taken, read = sum(stage.taken.values()), stage.offset + stage.samples
        if stage.taken and plan.ends(stage) and read > (1 + _ROUNDED_UP) * taken:
            warnings.append(
                f"stage {stage.name} takes {taken:,} samples and reads {read:,}: it ends with a whole step of "
                f"{stage.global_batch_size:,}; a smaller global_batch_size of its own keeps closer to it"
            )
    return warnings


def _turned_back(plan: RunPlan) -> list[str]:
    """A stage behind one with a rotary base of its own has the model's again: what was learned does not fit that."""
    return [
        f"stage {stage.name} has model.rotary_base again, after {before.rotary_base:,.0f} in {before.name}: say "
        "rotary_base there too, if that is to stay"
        for before, stage in pairwise(plan.stages)
        if before.rotary_base is not None and stage.rotary_base is None
    ]


def _unread(plan: RunPlan, data: DataConfig) -> list[str]:
    """A source that is there and in no stage was forgotten, or is misspelt."""
    read = {name for stage in plan.stages for name in stage.counts}
    return [f"data.sources.{name} is read by no stage" for name in data.sources if name not in read]
