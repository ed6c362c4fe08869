"""Learning-rate schedules against their formulas."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext.config import RunConfig
from megatron_ext.training.schedule import learning_rate, rates_at_ends
from megatron_ext.training.schedule_faults import decay_moved, schedule_end, schedule_faults, schedule_warnings
from tests.support.minimal_run import load, mapping
from tests.unit.training.plans import Part, part, plan_of, plan_of_run


def rates(kind: str, iters: int = 100, **fields: Any) -> list[float]:
    raw = mapping(train={"train_iters": iters}, optimizer={"lr": 1.0})
    raw["schedule"] = {"kind": kind, **fields}
    run = load(raw)
    return [learning_rate(run, plan_of_run(run), step) for step in range(iters)]


def staged(parts: list[Part], lr: float = 1.0, **schedule: Any) -> RunConfig:
    """A run whose stages are `parts`."""
    stages = [
        {"name": name, "mix": {"a": 1.0}, "steps": sum(p.steps for p in parts if p.name == name)}
        | {"global_batch_size": size, "sequence_length": length, **keys}
        for name, size, length, keys in {
            p.name: (p.name, p.global_batch_size, p.sequence_length, dict(p.keys)) for p in parts
        }.values()
    ]
    raw = mapping(optimizer={"lr": lr})
    raw["data"] = raw["data"] | {"train": [], "cache_dir": None, "sources": {"a": {"path": "a"}}, "stages": stages}
    raw["schedule"] = schedule
    return load(raw)


def staged_rates(parts: list[Part], **schedule: Any) -> list[float]:
    run, plan = staged(parts, **schedule), plan_of(*parts)
    assert schedule_faults(run, plan) == []
    return [learning_rate(run, plan, step) for step in range(plan.total_steps)]


def test_warmup_is_linear_and_reaches_the_peak_with_its_last_step() -> None:
    values = rates("constant", warmup_iters=4)
    assert values[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert values[-1] == 1.0


def test_linear() -> None:
    values = rates("linear", warmup_iters=20, min_lr=0.2)
    for step in range(20, 100):
        assert values[step] == pytest.approx(1.0 - 0.8 * (step + 1 - 20) / 80)
    assert values[-1] == pytest.approx(0.2)


def test_cosine() -> None:
    values = rates("cosine", warmup_iters=20, decay_iters=60, min_lr=0.1)
    for step in range(20, 60):
        assert values[step] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * (step + 1 - 20) / 40)))
    assert values[59] == pytest.approx(0.1)
    assert values[60:] == pytest.approx([0.1] * 40)


@pytest.mark.parametrize(
    ("style", "half_way"),
    [
        ("linear", 0.55),
        ("cosine", 0.55),
        ("minus_sqrt", 0.1 + 0.9 * (1 - math.sqrt(0.5))),
        ("geometric", math.sqrt(0.1)),
        ("exponential_megatron", 0.1 + 0.9 * (math.sqrt(2) - 1)),
    ],
)
def test_wsd(style: str, half_way: float) -> None:
    values = rates("wsd", warmup_iters=10, wsd_decay_iters=20, decay_style=style, min_lr=0.1)
    assert values[10:80] == [1.0] * 70
    assert values[89] == pytest.approx(half_way)
    assert values[99] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(values[80:], values[81:], strict=False))


def test_the_rate_depends_on_the_step_alone() -> None:
    """Nothing is carried along: the value at a step is the same whatever was asked before."""
    raw = mapping(train={"train_iters": 50}, optimizer={"lr": 1.0})
    run = load(raw)
    plan = plan_of_run(run)
    assert learning_rate(run, plan, 30) == [learning_rate(run, plan, s) for s in range(50)][30]


@pytest.mark.parametrize(
    ("kind", "fields", "style", "wsd_style"),
    [
        ("linear", {}, "linear", None),
        ("cosine", {}, "cosine", None),
        ("wsd", {"wsd_decay_iters": 40, "decay_style": "linear"}, "WSD", "linear"),
        ("wsd", {"wsd_decay_iters": 40, "decay_style": "cosine"}, "WSD", "cosine"),
        ("wsd", {"wsd_decay_iters": 40, "decay_style": "minus_sqrt"}, "WSD", "minus_sqrt"),
        ("wsd", {"wsd_decay_iters": 40, "decay_style": "exponential_megatron"}, "WSD", "exponential"),
    ],
)
def test_schedules_are_those_of_megatron(kind: str, fields: dict[str, Any], style: str, wsd_style: str | None) -> None:
    """Its scheduler stands at the steps that are done; ours is asked for the step that comes."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer = SimpleNamespace(param_groups=[{}])
    scheduler = OptimizerParamScheduler(
        optimizer, 0.0, 1.0, 0.1, 10, 100, style, 0.0, 0.0, 100, "constant",
        wsd_decay_steps=fields.get("wsd_decay_iters"), lr_wsd_decay_style=wsd_style,
    )  # fmt: skip
    expected = []
    for _ in range(100):
        scheduler.step(1)
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates(kind, warmup_iters=10, min_lr=0.1, **fields) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("in_steps", "in_tokens"),
    [
        ({"kind": "constant", "warmup_iters": 3}, {"warmup_tokens": 3}),
        ({"kind": "cosine", "warmup_iters": 5, "min_lr": 0.1}, {"warmup_tokens": 5}),
        ({"kind": "linear", "warmup_iters": 5, "decay_iters": 40}, {"warmup_tokens": 5, "decay_tokens": 40}),
        ({"kind": "wsd", "warmup_iters": 5, "wsd_decay_iters": 15}, {"warmup_tokens": 5, "wsd_decay_tokens": 15}),
    ],
    ids=["constant", "cosine", "linear", "wsd"],
)
def test_tokens_say_the_same_as_the_steps_that_have_them(in_steps: dict[str, Any], in_tokens: dict[str, int]) -> None:
    other = {key: value for key, value in in_steps.items() if not key.endswith("_iters")}
    tokens = {key: count * 8 * 64 for key, count in in_tokens.items()}
    assert rates(iters=50, **in_steps) == pytest.approx(rates(iters=50, **other, **tokens), rel=1e-14)


STAGES = [part("wide", 10), part("long", 10, 4, 256), part("anneal", 5, 8, 256)]
"""5,120, 10,240 and 10,240 tokens: steps of 512, 1,024 and 2,048."""


def test_one_decay_goes_over_stages_of_other_sizes_in_tokens() -> None:
    values = staged_rates(STAGES, kind="linear", warmup_tokens=2048)
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    consumed = [512 * n for n in range(1, 11)] + [5120 + 1024 * n for n in range(1, 11)]
    consumed += [15360 + 2048 * n for n in range(1, 6)]
    for value, tokens in zip(values[4:], consumed[4:], strict=True):
        assert value == pytest.approx(1 - (tokens - 2048) / (25600 - 2048))
    assert values[-1] == 0
    # Steps of a warmup stay steps, those of a decay are where their tokens are.
    assert staged_rates(STAGES, kind="linear", warmup_iters=4) == values
    early = staged_rates(STAGES, kind="linear", warmup_iters=4, decay_iters=20)
    assert early == staged_rates(STAGES, kind="linear", warmup_tokens=2048, decay={"stage": "long"})
    assert early == staged_rates(STAGES, kind="linear", warmup_tokens=2048, decay_tokens=15360)
    assert early[19:] == [0] * 6


def test_a_stage_is_the_warmup_or_the_decay_of_wsd() -> None:
    values = staged_rates(STAGES, kind="wsd", warmup={"stage": "wide"}, decay={"stage": "anneal"}, decay_style="linear")
    assert values[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert values[10:20] == [1.0] * 10
    assert values[20:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0])
    assert (
        staged_rates(STAGES, kind="wsd", wsd_decay_tokens=10240)[20:]
        == staged_rates(STAGES, kind="wsd", wsd_decay_iters=5)[20:]
    )


def test_wsd_is_open_until_a_decay_is_added() -> None:
    open_ended = staged_rates(STAGES[:2], kind="wsd", warmup_iters=2)
    assert open_ended[1:] == [1.0] * 19
    closed = staged_rates(STAGES, kind="wsd", warmup_iters=2, decay={"stage": "anneal"})
    assert closed[:20] == open_ended


def test_a_stage_scales_the_rate_at_once_or_over_a_transition() -> None:
    parts = [part("a", 4), part("b", 4, lr_scale=0.5), part("c", 4, lr_scale=0.25, transition_tokens=1024)]
    assert staged_rates(parts, kind="constant") == [1.0] * 4 + [0.5] * 4 + [0.375, 0.25, 0.25, 0.25]
    # A stage that goes on with another batch size is in two parts: the transition goes on through both.
    cut = [*parts[:2], part("c", 1, lr_scale=0.25, transition_tokens=1024), part("c", 3, **dict(parts[2].keys))]
    assert staged_rates(cut, kind="constant")[8:] == [0.375, 0.25, 0.25, 0.25]


def test_a_stage_may_begin_anew() -> None:
    again = {"kind": "linear", "warmup_iters": 2}
    parts = [part("a", 4), part("b", 4, schedule=again, lr_scale=0.5), part("c", 2)]
    values = staged_rates(parts, kind="linear")
    assert values[:4] == [0.75, 0.5, 0.25, 0]
    assert values[4:8] == [0.25, 0.5, 0.375, 0.25]  # it covers c too, whose factor is 1
    assert values[8:] == [0.25, 0]


def test_rates_at_both_ends_of_each_stage() -> None:
    run, plan = staged(STAGES, kind="linear"), plan_of(*STAGES)
    ends = [rate for rates in rates_at_ends(run, plan) for rate in rates]
    assert ends == pytest.approx([0.98, 0.8, 0.76, 0.4, 0.32, 0.0])


def test_a_rate_that_jumps_up_for_want_of_a_factor_is_warned_of() -> None:
    parts = [part("a", 4, lr_scale=0.5), part("b", 4), part("c", 2, lr_scale=2.0, transition_tokens=512)]
    (warning,) = schedule_warnings(staged(parts, kind="constant"), plan_of(*parts))
    assert warning.startswith("the learning rate jumps from 0.5 to 1 as stage b begins: its lr_scale is 1, after 0.5")


def test_a_schedule_that_does_not_fit_its_stages_names_both_keys() -> None:
    def said(parts: list[Part], **schedule: Any) -> str:
        return "\n".join(schedule_faults(staged(parts, **schedule), plan_of(*parts)))

    assert "schedule.warmup_tokens = 30000: the warmup is longer than the 25600 tokens" in said(
        STAGES, kind="cosine", warmup_tokens=30000
    )
    both = said(STAGES, kind="wsd", warmup_tokens=20000, decay={"stage": "anneal"})
    assert "schedule.warmup_tokens = 20000, schedule.decay.stage = 'anneal': warmup and final decay together" in both
    assert "longer than the run" in said(STAGES, kind="wsd", wsd_decay_iters=30)
    both = said(STAGES, kind="linear", warmup={"stage": "wide"}, decay_iters=10)
    assert "schedule.warmup.stage = 'wide', schedule.decay_iters = 10: the decay must end after the warmup" in both
    parts = [
        STAGES[0],
        part("b", 2, lr_scale=0.5, transition_tokens=2000, schedule={"kind": "cosine", "warmup_iters": 3}),
    ]
    faults = said(parts, kind="constant")
    assert "data.stages: schedule of b.warmup_iters = 3: the warmup is longer than the 1024 tokens" in faults
    assert "transition_tokens = 2000 of b are more than its 1024 tokens" in faults


def test_a_schedule_of_tokens_does_not_mind_another_batch_on_the_way() -> None:
    """48 steps of 512 tokens; or 24 of them, and 12 of twice as many."""

    def pieces(*batches: tuple[int, int]) -> list[Part]:
        return [Part("a", steps, size, 64, (("tokens", 48 * 512.0), ("steps", None))) for steps, size in batches]

    run, wide = staged(pieces((48, 8)), kind="cosine", warmup_iters=4), plan_of(*pieces((24, 8), (12, 16)))
    values = [learning_rate(run, plan_of(*pieces((48, 8))), step) for step in range(48)]
    changed = [learning_rate(run, wide, step) for step in range(36)]
    assert changed == values[:24] + values[25::2]
    assert decay_moved(run, wide, 24, schedule_end(run, plan_of(*pieces((49, 8))), 24)) is None  # rounded up


def test_a_decay_that_moves_with_the_end_of_the_run_is_said_or_refused() -> None:
    def moved(parts: list[Part], saved: dict[str, Any], **schedule: Any) -> str | None:
        before = schedule_end(staged(STAGES, **saved), plan_of(*STAGES), 12)
        return decay_moved(staged(parts, **schedule), plan_of(*parts), 12, before)

    cosine, longer = {"kind": "cosine", "warmup_iters": 2}, [*STAGES, part("more", 5)]
    assert moved(STAGES, cosine, **cosine) is None
    complaint = moved(longer, cosine, **cosine)
    assert complaint is not None
    assert "was 25,600 tokens in the checkpoint and is 28,160 in this run" in complaint
    assert "schedule.decay_tokens = 25600 to keep the decay as it was, or 28160" in complaint
    assert moved(longer, cosine, **cosine, decay_tokens=25600) is None
    for saved in ({"kind": "wsd", "wsd_decay_iters": 3}, {"kind": "constant"}):
        assert moved(longer, saved, **saved) is None
    assert moved(longer, {"kind": "constant"}, **cosine) is None  # another kind is said
