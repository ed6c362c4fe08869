"""Learning-rate schedules against their formulas."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext.training.schedule import learning_rate
from tests.unit.config.test_load import load, mapping


def rates(kind: str, iters: int = 100, **fields: Any) -> list[float]:
    raw = mapping(train={"train_iters": iters}, optimizer={"lr": 1.0})
    raw["schedule"] = {"kind": kind, **fields}
    run = load(raw)
    return [learning_rate(run, step) for step in range(iters)]


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
    assert learning_rate(run, 30) == [learning_rate(run, s) for s in range(50)][30]


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
