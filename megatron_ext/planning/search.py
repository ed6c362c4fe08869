"""All legal layouts of a run on so many GPUs, by the rules of the configuration, each with its memory and its time."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_ext.config import Layout, ParallelConfig, RecomputeConfig, RunConfig
from megatron_ext.config.load import values_of
from megatron_ext.config.rules import RULES, stage_violations
from megatron_ext.config.rules.registry import Rule
from megatron_ext.errors import ConfigError
from megatron_ext.planning.assumptions import Assumptions
from megatron_ext.planning.memory import ModelState, StateMemory
from megatron_ext.planning.peak_memory import PeakMemory, peak_memory
from megatron_ext.planning.proven import is_proven
from megatron_ext.planning.run_length import RunLength, run_length
from megatron_ext.planning.step_time import StepTime, step_time

SHORTEST_SLICE = 1024
"""Tokens of a sequence that a context-parallel rank has at least."""
MOST_CHUNKS = 8
"""Virtual pipeline stages of a stage at most."""
MICRO_BATCHES = (1, 2, 4, 8)
_CHANGED = ("parallel", "recompute", "train")
"""Sections that a layout changes."""
MOST_LEGAL = 200_000
"""Layouts beyond which nobody waits."""


@dataclass(frozen=True)
class Candidate:
    """One layout of a run."""

    run: RunConfig
    """With the layout, micro-batch and recompute in it."""
    layout: Layout
    states: Sequence[StateMemory]
    time: StepTime
    """Of the steps that most of the run's tokens are in."""

    @property
    def degrees(self) -> tuple[object, ...]:
        """What tells layouts apart for people: not the chunks of a stage, micro-batches or recompute."""
        return self.layout.tp, self.layout.cp, self.layout.pp, self.layout.ep, self.layout.etp

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and optimizer of the fullest rank."""
        return max(state.bytes for state in self.states)

    @property
    def is_proven(self) -> bool:
        """Whether the parity grid has a layout of this kind."""
        return is_proven(self.run, self.layout)

    def memory(self, assumed: Assumptions) -> PeakMemory:
        """Of the fullest rank."""
        return peak_memory(self.run, self.layout, self.states, imbalance=assumed.expert_imbalance)


@dataclass(frozen=True)
class Choice:
    """A layout that fits."""

    candidate: Candidate
    memory: PeakMemory
    rate: float
    """Tokens a second over the whole run, whatever kinds of steps it has."""


@dataclass(frozen=True)
class Search:
    """What was found."""

    legal: int
    """Layouts that the rules allow, with micro-batches and recompute."""
    too_large: int
    """Of those, faster ones than the last chosen that do not fit."""
    chosen: Sequence[Choice]
    """Of different degrees, the fastest first."""
    smallest: PeakMemory | None
    """Where nothing fits: of the layout that needs least."""


def search(
    run: RunConfig, world_size: int, assumed: Assumptions, best: int = 5, length: RunLength | None = None
) -> Search:
    """The `best` fastest layouts of `run` on `world_size` GPUs that have room there.

    Args:
        length: with the kinds of steps that the run's tokens are in. Default: what its configuration alone says.

    Raises:
        ConfigError: no layout is legal; with what stands in the way of the run as it is.
    """
    length = length or run_length(run)
    found = candidates(run, world_size, assumed, length)
    if not found:
        raise ConfigError(_nothing_legal(run, world_size))
    chosen, too_large = list[Choice](), list[Candidate]()
    for candidate in sorted(found, key=lambda one: one.time.seconds / one.time.tokens):
        if any(candidate.degrees == choice.candidate.degrees for choice in chosen):
            continue
        # Of most that are too large the state alone is, which is known; the rest is dear to find out.
        memory = candidate.memory(assumed) if assumed.fits(candidate.state_bytes) else None
        if memory is None or not assumed.fits(memory.total):
            too_large.append(candidate)
            continue
        chosen.append(Choice(candidate, memory, tokens_a_second(candidate, length, assumed)))
        if len(chosen) == best:
            break
    smallest = None
    if not chosen:
        smallest = min((one.memory(assumed) for one in too_large), key=lambda memory: memory.total)
    return Search(len(found), len(too_large), chosen, smallest)


def tokens_a_second(one: Candidate, length: RunLength, assumed: Assumptions) -> float:
    """Over the whole run, each kind of step by its share of the tokens."""
    seconds, shapes = 0.0, one.run.step_shapes
    for number, share in length.kinds:
        time = step_time(one.run, one.layout, one.states, shapes[number], assumed)
        seconds += share * time.seconds / time.tokens
    return 1 / seconds


def _nothing_legal(run: RunConfig, world_size: int) -> str:
    batch = run.train.global_batch_size
    lines = [
        f"no layout of this run is legal on {world_size} GPUs: try another number of them, or batches that are "
        f"multiples of it, such as train.global_batch_size={-(-batch // world_size) * world_size} instead of {batch}"
    ]
    try:
        run.resolve(world_size)
    except ConfigError as error:
        lines += [f"in the layout that it has: {error}"]
    return "\n".join(lines)


def candidates(
    run: RunConfig, world_size: int, assumed: Assumptions, length: RunLength | None = None
) -> list[Candidate]:
    """Every legal layout with its time; the run's own keys that a layout does not say stay as they are."""
    length = length or run_length(run)
    state, found, legality = ModelState(run), list[Candidate](), Legality(run)
    trains = [replace(run.train, micro_batch_size=micro) for micro in _micro_batches(run)]
    recomputes = _recomputes(run)
    for parallel in _parallels(run, world_size, assumed):
        if not legality.takes(parallel=parallel):
            continue
        states: Sequence[StateMemory] | None = None
        for train in trains:
            try:
                layout = replace(run, parallel=parallel, train=train).resolve(world_size)
            except ConfigError:
                continue
            if not legality.takes(parallel=parallel, train=train):
                continue
            for recompute in recomputes:
                if not legality.takes(parallel=parallel, train=train, recompute=recompute):
                    continue
                variant = replace(run, parallel=parallel, train=train, recompute=recompute)
                if not legality.takes_stages(variant):
                    continue
                states = states or state.stages(variant, layout)
                time = step_time(variant, layout, states, length.usual(variant), assumed)
                found.append(Candidate(variant, layout, states, time))
            if len(found) > MOST_LEGAL:
                raise ConfigError(f"more than {MOST_LEGAL:,} layouts are legal on {world_size} GPUs; plan for a part")
    return found


def with_layout(run: RunConfig, parallel: ParallelConfig, micro: int, recompute: RecomputeConfig) -> RunConfig:
    """`run` in another layout."""
    return replace(run, parallel=parallel, recompute=recompute, train=replace(run.train, micro_batch_size=micro))


class Legality:
    """The rules of the configuration, for variants of a run that differ by their layout.

    A rule is asked again only where a section that it reads is another object than before.
    """

    def __init__(self, run: RunConfig) -> None:
        self._run, self._values = run, values_of(run)
        # Of stages only batches and lengths meet a layout.
        sizes = {(s.sequence_length, s.micro_batch_size, s.global_batch_size): s for s in run.data.stages}
        self._stages = [replace(stage, schedule=None) for size, stage in sizes.items() if any(size)]
        # What reads nothing that a layout changes says of each variant what it says of the run.
        rules: dict[tuple[str, ...], list[Rule]] = {}
        for rule in RULES:
            sections = {name.split(".")[0] for name in rule.keys + rule.given}
            if read := tuple(name for name in _CHANGED if name in sections):
                rules.setdefault(read, []).append(rule)
        self._groups = [(read, some, self._without(read)) for read, some in rules.items()]
        self._said: dict[tuple[int, ...], tuple[list[object], bool]] = {}
        """By the sections that were looked at, which are kept: no other gets the place in memory of one."""

    def takes(self, **sections: object) -> bool:
        """Whether no rule that reads only these of the changed sections speaks against them."""
        for number, (read, rules, others) in enumerate(self._groups):
            if not sections.keys() >= set(read):
                continue
            parts = [sections[name] for name in read]
            key = (number, *map(id, parts))
            if key not in self._said:
                changed: dict[str, Any] = dict(zip(read, parts, strict=True))
                variant = replace(self._run, **changed)
                values = others | dict(values_of(variant, read))
                self._said[key] = parts, not any(rule.violations(values) for rule in rules)
            if not self._said[key][1]:
                return False
        return True

    def takes_stages(self, variant: RunConfig) -> bool:
        """Whether each stage of its data goes with the layout of `variant`."""
        if not self._stages:
            return True
        values = self._without(_CHANGED) | dict(values_of(variant, _CHANGED))
        return not stage_violations(values | {"data.stages": self._stages})

    def _without(self, sections: Sequence[str]) -> dict[str, object]:
        """The values of the run, but for these sections."""
        return {name: value for name, value in self._values.items() if name.split(".")[0] not in sections}


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]


def _parallels(run: RunConfig, world_size: int, assumed: Assumptions) -> Iterator[ParallelConfig]:
    """Degrees that multiply up; the rules say which of them the model takes."""
    shortest = min(shape.length for shape in run.step_shapes)
    for tp in _divisors(world_size, assumed.gpus_per_node):
        for cp in _divisors(world_size // tp, max(shortest // SHORTEST_SLICE, 1)):
            for pp in _divisors(world_size // (tp * cp), run.model.num_layers + 2):
                for ep, etp in _expert_degrees(run, tp, world_size // pp):
                    yield from _with_degrees(run, tp, cp, pp, ep, etp)


def _expert_degrees(run: RunConfig, tp: int, stage: int) -> Iterator[tuple[int, int | None]]:
    if not run.model.is_moe:
        yield 1, None
        return
    for ep in _divisors(stage, run.model.num_moe_experts or 1):
        yield ep, None if tp == 1 or ep == 1 else tp
        if tp > 1 and ep > 1:
            yield ep, 1


def _with_degrees(run: RunConfig, tp: int, cp: int, pp: int, ep: int, etp: int | None) -> Iterator[ParallelConfig]:
    parallel = run.parallel
    both = {(parallel.account_for_embedding_in_pipeline_split, parallel.account_for_loss_in_pipeline_split)}
    chunks: list[int | None] = [None]
    if pp > 1:
        both |= {(False, False), (True, True)}
        chunks += list(range(2, MOST_CHUNKS + 1))
    for (embedding, loss), vpp in itertools.product(sorted(both), chunks):
        if (run.model.num_layers + embedding + loss) % (pp * (vpp or 1)):
            continue
        yield replace(
            parallel,
            tensor_model_parallel_size=tp,
            sequence_parallel=tp > 1,
            context_parallel_size=cp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            account_for_embedding_in_pipeline_split=embedding,
            account_for_loss_in_pipeline_split=loss,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
        )


def _micro_batches(run: RunConfig) -> list[int]:
    return sorted({*MICRO_BATCHES, run.train.micro_batch_size})


def _recomputes(run: RunConfig) -> list[RecomputeConfig]:
    """Nothing, the feed-forward networks, everything, and what the run says."""
    network = [*(["moe"] if run.model.is_moe else []), *(["mlp"] if run.model.has_dense_layers else [])]
    logits = run.recompute.logits
    choices = [
        RecomputeConfig(logits=logits),
        RecomputeConfig(granularity="selective", modules=network, logits=logits),  # type: ignore[arg-type]
        RecomputeConfig(granularity="full", logits=logits),
    ]
    return choices if run.recompute in choices else [*choices, run.recompute]
