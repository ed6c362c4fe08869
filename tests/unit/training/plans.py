"""Plans of stages of so many steps, made by hand: what the learning rate is a function of."""

from dataclasses import dataclass
from typing import Any

from megatron_ext.config import RunConfig, load_config
from megatron_ext.config.data import Stage, source_ids
from megatron_ext.data.stream.make_plan import SourceSize, make_plan
from megatron_ext.data.stream.plan import RunPlan, StagePlan


@dataclass(frozen=True)
class Part:
    """A stretch of a plan."""

    name: str
    steps: int
    global_batch_size: int = 8
    sequence_length: int = 64
    keys: tuple[tuple[str, Any], ...] = ()
    """Other keys of the stage."""


def part(name: str, steps: int, global_batch_size: int = 8, sequence_length: int = 64, **keys: Any) -> Part:
    return Part(name, steps, global_batch_size, sequence_length, tuple(keys.items()))


def plan_of(*parts: Part) -> RunPlan:
    """The plan that has these parts one after the other."""
    stages: list[StagePlan] = []
    step = sample = token = 0
    for number, one in enumerate(parts):
        samples = one.steps * one.global_batch_size
        tokens = samples * one.sequence_length
        stage: Stage = load_config(
            Stage, {"name": one.name, "mix": {"a": 1.0}, "steps": one.steps, **dict(one.keys)}, source="stage"
        )
        stages.append(
            StagePlan(
                number, one.name, step, one.steps, sample, samples, token, tokens,
                one.sequence_length, one.global_batch_size, 1, stage.lr_scale, stage.rotary_base,
                {"a": samples}, {}, stage, 0, {"a": 0}, {},
            )
        )  # fmt: skip
        step, sample, token = step + one.steps, sample + samples, token + tokens
    return RunPlan(tuple(stages), (), 64, 1234)


def plan_of_run(run: RunConfig) -> RunPlan:
    """The plan of a run without stages, whose data nobody reads."""
    return make_plan(run.data, run.train, {name: SourceSize(10**9) for name in source_ids(run.data.train)})
