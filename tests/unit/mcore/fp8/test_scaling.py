"""Delayed scaling's history against the formula written out, step by step."""

import math
from typing import Any

import pytest
import torch

from megatron_ext.config import Fp8Precision
from megatron_ext.mcore.fp8.histories import AmaxHistories
from megatron_ext.mcore.fp8.scaling import Role, Scaling


def delayed(**fields: Any) -> Scaling:
    return Scaling(Fp8Precision(kind="fp8", recipe="delayed", **fields))


def histories(*scalings: Scaling) -> AmaxHistories:
    return AmaxHistories({f"layer {n}": scaling for n, scaling in enumerate(scalings)}, is_writer=True)


def power_of_two_from(ratio: float) -> float:
    return 2.0 ** math.ceil(math.log2(ratio))


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("length", [1, 3])
def test_scales_follow_the_history(algorithm: str, margin: int, length: int) -> None:
    scaling = delayed(amax_history_len=length, amax_compute_algo=algorithm, margin=margin)
    history: list[float] = []
    # Two micro-batches a step; the step's maximum is the larger of the two.
    steps = [(1.0, 3.0), (100.0, 50.0), (7.0, 2.0), (0.5, 0.25), (0.125, 0.0625), (900.0, 1.0)]
    for micro_batches in steps:
        past = history[:length]
        for largest in micro_batches:
            known = past or [largest]
            expected = max(known) if algorithm == "max" else known[0]
            x = torch.tensor([[0.0, -largest]])
            scale = scaling.quantize(Role.INPUT, x).scale
            assert float(scale) == power_of_two_from(expected / 448) * 2**margin
        histories(scaling).commit(None)
        history.insert(0, max(micro_batches))
        padded = (history + [0.0] * length)[:length]
        assert scaling.amax_history[Role.INPUT].tolist() == padded
    assert not scaling.amax_history[Role.WEIGHT].any(), "each operand has its own history"


def test_a_stale_maximum_saturates_and_is_followed_in_the_next_step() -> None:
    scaling = delayed(amax_compute_algo="most_recent")
    scaling.quantize(Role.INPUT, torch.tensor([[1.0]]))
    histories(scaling).commit(None)
    spike = torch.tensor([[1000.0, 1.0]])
    assert scaling.quantize(Role.INPUT, spike).dequantize().tolist() == [[448 * 2.0**-8, 1.0]]
    histories(scaling).commit(None)
    assert float(scaling.quantize(Role.INPUT, spike).dequantize()[0, 0]) == pytest.approx(1000, rel=2**-4)


def test_passing_a_micro_batch_twice_changes_nothing() -> None:
    once, twice = delayed(), delayed()
    x = torch.randn(4, 8)
    first = once.quantize(Role.INPUT, x)
    for _ in range(2):
        assert torch.equal(twice.quantize(Role.INPUT, x).scale, first.scale)
    histories(once, twice).commit(None)
    assert torch.equal(once.amax_history, twice.amax_history)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible_and_out_of_the_history(value: float) -> None:
    scaling = delayed()
    scaling.quantize(Role.INPUT, torch.tensor([[4.0]]))
    histories(scaling).commit(None)
    before = scaling.amax_history.clone()
    assert scaling.quantize(Role.INPUT, torch.tensor([[value, 1.0]])).dequantize().isnan().all()
    histories(scaling).discard()
    assert torch.equal(scaling.amax_history, before)
    # Also where the step was made all the same: the entry counts as unknown.
    scaling.quantize(Role.INPUT, torch.tensor([[value]]))
    histories(scaling).commit(None)
    assert scaling.amax_history[Role.INPUT, :2].tolist() == [0.0, 4.0]


def test_validation_leaves_the_history_alone() -> None:
    scaling = delayed().eval()
    scaling.quantize(Role.INPUT, torch.tensor([[4.0]]))
    histories(scaling).commit(None)
    assert not scaling.amax_history.any()


def test_converting_the_model_to_bf16_does_not_round_the_history() -> None:
    scaling = delayed()
    scaling.quantize(Role.INPUT, torch.tensor([[1.001]]))
    histories(scaling).commit(None)
    torch.nn.Sequential(scaling).bfloat16()
    assert scaling.amax_history.dtype == scaling.latest.dtype == torch.float32


def test_other_recipes_keep_no_state() -> None:
    for recipe in ("tensorwise", "rowwise", "blockwise", "mxfp8"):
        scaling = Scaling(Fp8Precision(kind="fp8", recipe=recipe))
        assert not list(scaling.buffers())
        assert not scaling.is_delayed


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_a_kept_weight_holds_until_the_step_or_the_weight_ends_it(recipe: str) -> None:
    scaling = Scaling(Fp8Precision(kind="fp8", recipe=recipe))
    weight = torch.nn.Parameter(torch.randn(3, 8))

    def is_of_now() -> bool:
        straight, lasting = scaling.weight(weight)
        turned = scaling.weight_t(weight, lasting)
        fresh = scaling.quantize(Role.WEIGHT, weight.detach()).values.view(torch.uint8)
        return all(torch.equal(q.view(torch.uint8), fresh) for q in (straight.values, turned.values.t()))

    scaling.open_step()
    first, _ = scaling.weight(weight)
    assert scaling.weight(weight)[0] is first
    weight.data.mul_(-1)  # past the version counter, as optimizers write: only the end of a step tells
    assert not is_of_now()
    with torch.no_grad():
        weight.mul_(1)
    assert is_of_now()
    weight.data.mul_(-1)
    for end in (scaling.close_step, scaling.open_step, scaling.eval):
        assert not is_of_now()
        end()
        assert is_of_now()
        scaling.train().open_step()
        assert is_of_now()
        weight.data.mul_(-1)
