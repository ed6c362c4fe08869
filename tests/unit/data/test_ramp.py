"""The batch-size ramp: smaller batches at the beginning cut the same samples into more steps."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config import DataConfig, TrainConfig, load_config
from megatron_ext.config.training import RampStep
from megatron_ext.data.stream.make_plan import make_plan
from megatron_ext.data.stream.plan import RunPlan
from megatron_ext.data.stream.progress import Progress
from megatron_ext.data.stream.spans import Span, ramp_left, spans_of
from megatron_ext.data.stream.stream import PlannedShapes
from megatron_ext.errors import ConfigError
from tests.unit.data.plans import LENGTH, sizes_of, stored

RAMP = [{"global_batch_size": 16, "steps": 10}, {"global_batch_size": 32, "samples": 320}]
MIX = {"mix": {"ja": 0.6, "en": 0.4}}
SIZES = sizes_of({"ja": 1000, "en": 1000})


def planned(*stages: dict[str, Any], ramp: Any = RAMP, progress: Progress | None = None) -> RunPlan:
    raw = {"sequence_length": LENGTH, "tokenizer": "t", "sources": {name: {"path": name} for name in SIZES}}
    data = load_config(DataConfig, {**raw, "stages": list(stages)}, source="test")
    train = load_config(TrainConfig, {"global_batch_size": 64, "batch_size_ramp": ramp}, source="test")
    return make_plan(data, train, SIZES, progress)


@pytest.mark.parametrize("length", [{"steps": 50}, {"samples": 2400}, {"tokens": 2400 * LENGTH}])
def test_samples_and_steps_of_a_ramp(length: dict[str, int]) -> None:
    """10 steps of 16, 10 of 32, 30 of 64: the samples 0 to 159, 160 to 479, 480 to 2,399."""
    plan = planned({"name": "a", **MIX, **length}, {"name": "b", **MIX, "steps": 2})
    cut = [(s.name, s.global_batch_size, s.steps, s.first_sample, s.first_token // LENGTH) for s in plan.stages]
    assert cut == [("a", 16, 10, 0, 0), ("a", 32, 10, 160, 160), ("a", 64, 30, 480, 480), ("b", 64, 2, 2400, 2400)]
    shapes = PlannedShapes(plan, dp_size=2)
    assert [shapes.at(n).global_batch for n in (0, 159, 160, 479, 480, 2400)] == [16, 16, 32, 32, 64, 64]
    assert [plan.samples_at(step) for step in (0, 10, 15, 20, 21)] == [0, 160, 320, 480, 544]
    # The same samples in the same order as without a ramp.
    plain = planned({"name": "a", **MIX, "samples": 2400}, ramp=[])
    assert [plan.place(n) for n in range(0, 2400, 7)] == [plain.place(n) for n in range(0, 2400, 7)]
    assert plan.stages[0].counts["ja"] == round(160 * 0.6)


@pytest.mark.parametrize("sample", [48, 160, 224, 480, 1504])
def test_a_ramp_goes_on_where_it_was_left(sample: int) -> None:
    stages = {"name": "a", **MIX, "samples": 2400}, {"name": "b", **MIX, "steps": 2}
    plan = planned(*stages)
    assert planned(*stages, progress=stored(plan, sample)).stages == plan.stages


def test_a_ramp_is_over_with_the_first_stage() -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size_ramp is longer than the 12 steps that stage 'a' has"):
        planned({"name": "a", **MIX, "steps": 12}, {"name": "b", **MIX, "steps": 100})
    assert len(planned({"name": "a", **MIX, "steps": 20}).stages) == 2  # as long as it


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=4), st.integers(1, 9), st.integers(1, 400))
def test_every_sample_is_in_one_step(ramp: list[tuple[int, int]], batch: int, samples: int) -> None:
    spans = spans_of([Span(*span) for span in ramp], batch, samples=samples)
    read = sum(span.samples for span in spans)
    assert samples <= read < samples + spans[-1].global_batch_size
    steps = sum(span.steps for span in spans)
    assert sum(span.steps for span in spans_of([Span(*span) for span in ramp], batch, steps=steps)) == steps
    steps_of_ramp = [RampStep(global_batch_size=size, steps=count) for size, count in ramp]
    train = TrainConfig(global_batch_size=batch, batch_size_ramp=steps_of_ramp)
    sizes = [span.global_batch_size for span in ramp_left(train, 0) for _ in range(span.steps)]
    for done in range(0, len(sizes) + 2):
        assert [s.global_batch_size for s in ramp_left(train, done) for _ in range(s.steps)] == sizes[done:]
