"""The plan of a run's data: its figures, what may change when a run goes on, and what is refused."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config import DataConfig, TrainConfig
from megatron_ext.config.data import DataSource, source_ids
from megatron_ext.data.stream.make_plan import SourceSize, make_plan
from megatron_ext.data.stream.plan import RunPlan
from megatron_ext.data.stream.progress import Progress, from_json, to_json
from megatron_ext.errors import CheckpointError, ConfigError, MegatronExtError
from tests.unit.data.plans import planned, stored

SOURCES = {"ja": 1000, "en": 600, "code": 50}
A = {"name": "A", "mix": {"ja": 0.5, "en": 0.3, "code": 0.2}, "samples": 800}
B = {"name": "B", "mix": {"ja": 0.7, "code": 0.3}, "samples": 1920, "global_batch_size": 32}


def reads(plan: RunPlan, first: int, count: int) -> list[tuple[str, int]]:
    """Source, and position in it over all epochs, of samples."""
    found = []
    for sample in range(first, first + count):
        stage = plan.stage_of_sample(sample)
        at = stage.offset + sample - stage.first_sample
        number = stage.pattern.source(at)
        name = list(stage.starts)[number]
        found.append((name, stage.starts[name] // stage.sequence_length + stage.pattern.count(number, at)))
    return found


def test_two_stages_count_their_sources() -> None:
    plan = planned(SOURCES, [A, B])
    first, second = plan.stages
    assert (first.steps, first.samples, second.steps, second.samples) == (50, 800, 60, 1920)
    assert first.counts == {"ja": 400, "en": 240, "code": 160}
    assert second.counts == {"ja": 1344, "code": 576}
    used = plan.consumed(800)
    assert [used[name].epochs for name in ("ja", "en", "code")] == [0.4, 0.4, 3.2]
    assert reads(plan, 800, 6) == [("ja", 400), ("code", 160), ("ja", 401), ("ja", 402), ("code", 161), ("ja", 403)]
    assert plan.place(801).epoch == 3
    used = plan.consumed(plan.total_samples)
    assert [round(used[name].epochs, 3) for name in ("ja", "en", "code")] == [1.744, 0.4, 14.72]
    assert (plan.total_steps, plan.total_samples, plan.total_tokens) == (110, 2720, 2720 * 8)
    assert [plan.tokens_at(step) for step in (0, 50, 51, 110)] == [0, 6400, 6400 + 256, 21760]
    assert [plan.stage_of_step(step).name for step in (0, 49, 50, 109)] == ["A", "A", "B", "B"]
    with pytest.raises(ValueError, match="step 110 is none of the plan's 110"):
        plan.stage_of_step(110)


def test_the_mix_of_the_stage_under_way_may_change() -> None:
    before = planned(SOURCES, [A, B])
    half = {**B, "mix": {"ja": 0.5, "en": 0.5}}
    plan = planned(SOURCES, [A, half], progress=stored(before, 800 + 640))
    assert [(s.name, s.samples) for s in plan.stages] == [("A", 800), ("B", 640), ("B", 1280)]
    assert plan.stages[1].counts == {"ja": 448, "code": 192}
    # Of equal weights the first id comes first: the order in which a file has them means nothing.
    assert reads(plan, 1440, 4) == [("en", 240), ("ja", 848), ("en", 241), ("ja", 849)]
    used = plan.consumed(plan.total_samples)
    assert {name: use.samples for name, use in used.items()} == {"ja": 1488, "en": 880, "code": 352}
    assert [round(used[name].epochs, 3) for name in ("ja", "en", "code")] == [1.488, 1.467, 7.04]
    assert plan.total_samples == 2720 == 800 + 640 + 1280
    again = planned(SOURCES, [A, half], progress=stored(plan, 2016))
    assert again == plan


def test_the_stage_under_way_may_be_ended_and_another_follow() -> None:
    before = planned(SOURCES, [A, B])
    ended = planned(SOURCES, [A, {"name": "C", "mix": {"en": 1}, "steps": 5}], progress=stored(before, 1440))
    assert [(s.name, s.samples, s.complete) for s in ended.stages] == [
        ("A", 800, True),
        ("B", 640, False),
        ("C", 80, True),
    ]
    again = planned(SOURCES, [A, {"name": "C", "mix": {"en": 1}, "steps": 5}], progress=stored(ended, 1456))
    assert again == ended
    with pytest.raises(CheckpointError, match="'B' was ended before its end, and is over"):
        planned(SOURCES, [A, {"name": "C", "mix": {"en": 1}, "steps": 5}, B], progress=stored(ended, 1456))


def test_a_longer_stage_under_way_goes_on_with_its_pattern() -> None:
    before = planned(SOURCES, [A])
    longer = planned(SOURCES, [{**A, "samples": 1600}], progress=stored(before, 400))
    assert longer == planned(SOURCES, [{**A, "samples": 1600}])
    # Also where all of it was read: nothing has begun behind it.
    assert planned(SOURCES, [{**A, "samples": 1600}], progress=stored(before, 800)) == longer


def test_the_sources_of_a_stage_that_is_over_may_be_gone_also_of_the_last() -> None:
    before = planned(SOURCES, [A, B])
    more = {"name": "C", "mix": {"en": 1}, "steps": 2}
    plan = planned({"en": 600}, [A, B, more], progress=stored(before, before.total_samples))
    assert [(s.name, s.samples) for s in plan.stages] == [("A", 800), ("B", 1920), ("C", 32)]
    assert plan.consumed(plan.total_samples)["ja"].samples == 1744
    with pytest.raises(ConfigError, match="stage 'B' reads ja, code, none of the sources"):
        planned({"en": 600}, [A, {**B, "samples": 3840}, more], progress=stored(before, before.total_samples))


def test_another_batch_reads_on_in_the_same_order() -> None:
    before = planned(SOURCES, [A, B])
    plan = planned(SOURCES, [A, B], batch=10, progress=stored(before, 160))
    assert [(s.name, s.steps, s.samples) for s in plan.stages] == [("A", 10, 160), ("A", 64, 640), ("B", 60, 1920)]
    assert [plan.place(n) for n in range(800)] == [before.place(n) for n in range(800)]
    uneven = planned(SOURCES, [A], batch=48, progress=stored(before, 160))
    assert uneven.total_samples == 160 + 14 * 48


def test_what_is_over_stays_as_it_was() -> None:
    progress = stored(planned(SOURCES, [A, B]), 1440)
    with pytest.raises(CheckpointError) as caught:
        planned(SOURCES, [{**A, "mix": {"ja": 1}}, B], progress=progress)
    assert 'in the checkpoint: {"name": "A", "mix": {"ja": 0.5, "en": 0.3, "code": 0.2}' in str(caught.value)
    assert 'in this run:       {"name": "A", "mix": {"ja": 1.0}' in str(caught.value)
    with pytest.raises(CheckpointError, match="stage 'A' is over, and is missing"):
        planned(SOURCES, [B], progress=progress)
    with pytest.raises(CheckpointError, match="stage 'A' is over, and stands elsewhere"):
        planned(SOURCES, [B, A], progress=progress)
    with pytest.raises(CheckpointError, match="finished stage stays as it was"):
        planned(SOURCES, [{**A, "mix": {"ja": 1}}], progress=stored(planned(SOURCES, [A]), 800))
    with pytest.raises(ConfigError, match="stage 'B' is 10 steps shorter than what was read of it already"):
        planned(SOURCES, [A, {**B, "samples": 320}], progress=progress)


def test_what_was_read_keeps_its_files_order_and_seed() -> None:
    before = planned(SOURCES, [A, B])
    progress = stored(before, 1440)
    other = {**progress.fingerprints, "ja": "other files"}
    changed = Progress(2, 16, 7, other, {**progress.orders, "en": "file"}, progress.parts, progress.windows)
    with pytest.raises(CheckpointError) as caught:
        planned(SOURCES, [A, B], progress=changed, unit_tokens=8)
    for part in ("'ja': its files are not those", "'en': order: file", "train.seed: 7", "data.unit_tokens: 16"):
        assert part in str(caught.value)
    renamed = {"japanese": 1000, "en": 600, "code": 50}
    stages = [A, {**B, "mix": {"japanese": 1}}]
    with pytest.raises(
        MegatronExtError, match="'japanese' and 'ja' are the same data|'ja' and 'japanese' are the same"
    ):
        _with_marks(renamed, stages, {"japanese": "files of ja"}, progress)


def _with_marks(samples: dict[str, int], stages: list[Any], marks: dict[str, str], progress: Progress) -> RunPlan:
    config = DataConfig(sequence_length=8, tokenizer="t", **_sources(samples, stages))
    sizes = {name: SourceSize(n * 8 + 1, marks.get(name, f"files of {name}")) for name, n in samples.items()}
    return make_plan(config, TrainConfig(global_batch_size=16), sizes, progress)


def _sources(samples: dict[str, int], stages: list[Any]) -> dict[str, Any]:
    from megatron_ext.config import Stage, StagedSource

    return {
        "sources": {name: StagedSource(path=name) for name in samples},
        "stages": [Stage(**stage) for stage in stages],
    }


def test_a_removed_source_is_remembered_and_goes_on_when_it_returns() -> None:
    before = planned(SOURCES, [A, B])
    without = planned({"ja": 1000, "code": 50}, [A, B], progress=stored(before, 1440))
    assert without.consumed(2720)["en"].samples == 240
    third = {"name": "C", "mix": {"en": 1}, "steps": 3}
    returned = planned(SOURCES, [A, B, third], progress=stored(without, 2720))
    assert reads(returned, 2720, 2) == [("en", 240), ("en", 241)]


def test_exact_amounts_are_taken_and_the_last_step_is_filled() -> None:
    take = {"name": "T", "take": {"en": {"epochs": 0.5}, "code": {"samples": 30}, "ja": {"tokens": 83}}}
    plan = planned(SOURCES, [take])
    (stage,) = plan.stages
    assert stage.taken == {"en": 300, "code": 30, "ja": 10}
    assert (stage.steps, stage.samples) == (22, 352)
    assert sum(stage.counts.values()) == 352
    assert stage.pattern.counts(340) == [300, 30, 10]
    more = {**take, "take": {**take["take"], "code": {"samples": 90}}}
    changed = planned(SOURCES, [more], progress=stored(plan, 160))
    used = changed.consumed(changed.total_samples)
    assert {name: use.samples for name, use in used.items()} == {"en": 300, "code": 90, "ja": 10}
    with pytest.raises(ConfigError, match="takes 8 tokens of 'en', and has read 1,"):
        planned(SOURCES, [{**take, "take": {"en": {"samples": 1}}}], progress=stored(plan, 160))
    with pytest.raises(ConfigError, match="not one sample of 8"):
        planned(SOURCES, [{"name": "T", "take": {"en": {"tokens": 3}}}])


def test_every_fault_is_said_at_once() -> None:
    stages = [
        {"name": "A", "mix": {"ja": 1, "none": 1}, "steps": 1, "sequence_length": 6},
        {"name": "B", "mix": {"tiny": 1}, "steps": 1},
    ]
    with pytest.raises(ConfigError) as caught:
        planned({"ja": 5, "tiny": 0}, stages)
    for part in (
        "'A' reads none, none of the sources (ja, tiny)",
        "'A': sequence_length = 6 does not divide",
        "'tiny': its 1 tokens",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ({"mix": {"ja": 0, "en": 0}, "steps": 1}, "the weight of ja, en must be greater than 0"),
        ({"mix": {"ja": 1, "en": -1}, "steps": 1}, "the weight of en must be greater than 0"),
        ({"mix": {"ja": 1}, "steps": 10**400}, "no run reads so many"),
        ({"mix": {"ja": 1, "en": 1}, "tokens": 1e30}, "no run reads so many"),
        ({"take": {"ja": {"tokens": 1e18}, "en": {"epochs": 1}}}, "no run reads so many"),
    ],
    ids=["no weight", "negative", "steps", "tokens", "take"],
)
def test_what_cannot_be_read_is_no_plan(stage: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        planned(SOURCES, [{"name": "A", **stage}])


def test_the_order_in_a_file_means_nothing() -> None:
    plan = planned(SOURCES, [A, B])
    turned = dict(reversed(list(SOURCES.items())))
    other = planned(turned, [{**A, "mix": dict(reversed(list(A["mix"].items())))}, B])  # type: ignore[attr-defined]
    assert [other.place(n) for n in range(900)] == [plan.place(n) for n in range(900)]
    assert [source.id for source in other.sources] == ["code", "en", "ja"]
    assert planned(SOURCES, [A, B], seed=5).place(0) != plan.place(0)


def test_longer_sequences_pass_over_the_rest_of_a_window() -> None:
    short = {"name": "short", "mix": {"ja": 1}, "samples": 21, "sequence_length": 2, "global_batch_size": 1}
    long = {"name": "long", "mix": {"ja": 1}, "steps": 4, "sequence_length": 8, "global_batch_size": 1}
    plan = planned({"ja": 1000}, [short, long])
    # A window is the 128th of a source: 7 units of 4 samples, of which the first 21 samples were read.
    assert plan.stages[1].skipped == {"ja": 7 * 8 - 42}
    assert plan.place(21).unit == planned({"ja": 1000}, [{**long, "steps": 300}]).place(7).unit
    used = plan.consumed(plan.total_samples)["ja"]
    assert (used.tokens, used.skipped) == (42 + 32, 7 * 8 - 42)
    whole = {**short, "samples": 28}
    assert planned({"ja": 1000}, [whole, long]).stages[1].skipped == {}
    # Of a source of fewer units it is one unit, and of a large one 256.
    assert planned({"ja": 10}, [short, long]).stages[1].skipped == {"ja": 48 - 42}
    assert planned({"ja": 40_000}, [short, long]).stages[1].skipped == {"ja": 256 * 8 - 42}
    filed = planned({"ja": 10}, [short, long], sources={"ja": {"order": "file"}})
    assert filed.stages[1].skipped == {"ja": 6}
    assert [filed.place(n).start for n in (0, 1, 21, 22)] == [0, 2, 48, 56]


def test_a_run_keeps_the_windows_that_it_began_with() -> None:
    short = {"name": "short", "mix": {"ja": 1}, "samples": 400, "sequence_length": 2, "global_batch_size": 1}
    plan = planned({"ja": 1000}, [short], unit_tokens=8)
    raw = to_json(plan.progress(21))
    assert raw["sources"]["ja"].pop("window_units") == 7
    older = from_json(raw, Path("state.json"))  # of a checkpoint that had 256 units for all, and did not say so
    went_on = planned({"ja": 1000}, [short], unit_tokens=8, progress=older)
    units = {went_on.place(n).unit for n in range(400)}
    assert units != {plan.place(n).unit for n in range(400)}
    assert units <= {planned({"ja": 1000}, [{**short, "sequence_length": 8}]).place(n).unit for n in range(256)}
    assert stored(went_on, 30).windows == {"ja": 256}


def test_a_blend_without_stages_is_one_stage() -> None:
    data = DataConfig(
        sequence_length=8,
        tokenizer="t",
        train=[DataSource(path="data/ja/train", weight=3), DataSource(path="data/en/train")],
    )
    train = TrainConfig(train_iters=10, global_batch_size=4)
    sizes = {"ja": SourceSize(801), "en": SourceSize(801)}
    plan = make_plan(data, train, sizes)
    assert [(s.name, s.steps, s.counts) for s in plan.stages] == [("train", 10, {"ja": 30, "en": 10})]
    assert source_ids([DataSource(path="a/x/train"), DataSource(path="b/x/train")]) == ["a/x", "b/x"]
    assert source_ids([DataSource(path="a/validation"), DataSource(path="b", id="z")], "validation") == ["a", "z"]


def test_a_record_that_was_changed_is_refused() -> None:
    raw = to_json(planned(SOURCES, [A, B]).progress(1440))
    for change, expected in (
        (lambda r: r["sources"]["ja"].update(position_tokens=8), "not the sums of the stages"),
        (lambda r: r["stages"][0]["stage"]["mix"].update(ja=0.6), "the definition of stage 'A' was changed"),
        (lambda r: r["stages"][0].update(samples=801), "the samples of stage 'A'"),
        (lambda r: r.pop("stages"), "stages is missing|'stages' is missing"),
    ):
        import copy
        from pathlib import Path

        other = copy.deepcopy(raw)
        change(other)
        with pytest.raises(CheckpointError, match=expected):
            from_json(other, Path("state.json"))


# Random plans, kills and changes


@st.composite
def stages(draw: st.DrawFn, names: list[str], number: int) -> dict[str, Any]:
    """A stage over some of the sources."""
    some = draw(st.lists(st.sampled_from(names), min_size=1, max_size=len(names), unique=True))
    stage: dict[str, Any] = {
        "name": f"stage {number}",
        "global_batch_size": draw(st.integers(1, 6)),
        "sequence_length": draw(st.sampled_from([2, 4, 8])),
    }
    if draw(st.booleans()):
        stage["mix"] = {name: draw(st.sampled_from([1.0, 2.0, 0.3])) for name in some}
        kind = draw(st.sampled_from(["steps", "samples", "tokens"]))
        stage[kind] = draw(st.integers(1, 30)) * (8 if kind == "tokens" else 1)
    else:
        stage["take"] = {name: {"samples": draw(st.integers(1, 25))} for name in some}
    return stage


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_is_read_is_what_the_plan_says_whatever_happens(data: st.DataObject) -> None:
    """Nothing twice within an epoch, nothing left out, and every count right, over kills and changes of the plan."""
    samples = data.draw(st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(1, 12), min_size=1))
    names = sorted(samples)
    plan_of = [data.draw(stages(names, number)) for number in range(data.draw(st.integers(1, 4)))]
    orders = {name: {"order": data.draw(st.sampled_from(["shuffled", "file"]))} for name in names}
    plan = planned(samples, plan_of, sources=orders, unit_tokens=8)
    seen: list[tuple[str, int, int, int]] = []
    at = fresh = 0
    while at < plan.total_samples:
        steps = data.draw(st.integers(1, 40))
        for _ in range(steps):
            if at >= plan.total_samples:
                break
            stage = plan.stage_of_sample(at)
            batch = stage.global_batch_size
            assert at + batch <= stage.first_sample + stage.samples, "a batch lies in one stage"
            for sample in range(at, at + batch):
                place = plan.place(sample)
                seen.append((place.source, place.epoch, place.start, place.length))
            at += batch
        progress = stored(plan, at)
        assert planned(samples, plan_of, progress=progress, sources=orders, unit_tokens=8) == plan
        if at < plan.total_samples and fresh < 3 and data.draw(st.booleans()):
            fresh += 1
            plan_of = _changed(data, plan, plan_of, names, at, fresh)
            plan = planned(samples, plan_of, progress=progress, sources=orders, unit_tokens=8)
    assert at == plan.total_samples == len(seen)
    _check_reads(plan, samples, seen)


def _changed(
    data: st.DataObject, plan: RunPlan, plan_of: list[dict[str, Any]], names: list[str], at: int, fresh: int
) -> list[dict[str, Any]]:
    """Stages changed from the one under way on."""
    current = plan.stage_of_sample(at)
    if current.first_sample == at and (current.number == 0 or plan.stages[current.number - 1].name != current.name):
        keep = [s for s in plan_of if any(p.name == s["name"] and p.number < current.number for p in plan.stages)]
        under_way: list[dict[str, Any]] = []
    else:
        index = next(i for i, stage in enumerate(plan_of) if stage["name"] == current.name)
        keep, under_way = plan_of[:index], [plan_of[index]]
    what = data.draw(st.sampled_from(["end", "mix", "batch", "leave"]))
    if what == "end":
        under_way = []
    for stage in under_way:
        if what == "mix" and "mix" in stage:
            under_way = [{**stage, "mix": {name: 1.0 for name in names}}]
        if what == "batch":
            under_way = [{**stage, "global_batch_size": data.draw(st.integers(1, 5))}]
    return [*keep, *under_way, data.draw(stages(names, 10 * fresh))]


def _check_reads(plan: RunPlan, samples: dict[str, int], seen: list[tuple[str, int, int, int]]) -> None:
    used = plan.consumed(plan.total_samples)
    for name, size in samples.items():
        tokens = Counter(
            (epoch, token)
            for source, epoch, start, length in seen
            if source == name
            for token in range(start, start + length)
        )
        assert not tokens or max(tokens.values()) == 1, "a token is read twice in an epoch"
        assert len(tokens) == used[name].tokens == sum(n for source, _, _, n in seen if source == name)
        assert all(0 <= token < size * 8 for _, token in tokens)
        # Every epoch but the last is whole, but for what was passed over, which is said.
        position = used[name].tokens + used[name].skipped
        assert max((epoch for epoch, _ in tokens), default=0) <= max(position - 1, 0) // (size * 8)
        if not used[name].skipped:
            for epoch in range(position // (size * 8)):
                assert sum(e == epoch for e, _ in tokens) == size * 8
