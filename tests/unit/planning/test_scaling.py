"""What papers say, against the figures that they print."""

import math
from dataclasses import replace

import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.planning.plan_text import advice
from megatron_ext.planning.run_length import run_length
from megatron_ext.planning.scaling import (
    compute_optimum,
    scratch_catches_up,
    scratch_moe_loss,
    suggestions,
    upcycled_loss,
    upcycling,
)
from tests.support.minimal_run import load, mapping
from tests.unit.planning.known_models import TANUKI_8X8B


def test_chinchilla_is_compute_optimal() -> None:
    """70B parameters on 1.4T tokens for 5.76e23 FLOPs (arXiv 2203.15556, table 3: 67B and 1.5T for Gopher's budget)."""
    best = compute_optimum(5.76e23)
    assert best.parameters == pytest.approx(67e9, rel=0.05)
    assert best.tokens == pytest.approx(1.4e12, rel=0.05)


def test_suggestions_are_those_of_the_papers() -> None:
    # DeepSeek LLM 7B and 67B on 2T tokens used 4.2e-4 with 9.4M tokens, 3.2e-4 with 18.9M (2401.02954, table 2).
    for parameters, rate, batch in ((7e9, 4.2e-4, 9.4e6), (67e9, 3.2e-4, 18.9e6)):
        deepseek, step_law = suggestions(parameters, 2e12, 6 * parameters)
        assert deepseek.learning_rate == pytest.approx(rate, rel=0.05)
        assert deepseek.batch_tokens == pytest.approx(batch, rel=0.1)
        assert 1e-4 < step_law.learning_rate < 2e-3
        assert 1e6 < step_law.batch_tokens < 1e7


def test_upcycling_is_worth_at_most_what_the_dense_model_cost() -> None:
    found = upcycling(1e12, 50e9, 80e9)
    assert found.scratch_catches_up * 80e9 == pytest.approx(1e12 * 50e9)
    assert found.better_than_dense == found.scratch_catches_up / 2


def test_the_joint_law_of_upcycling_meets_where_its_authors_stopped() -> None:
    """A 1B model of 74B tokens was upcycled for 37B (arXiv 2502.03009, table 7): there the law has both alike."""
    meet = scratch_catches_up(1e9, 74e9)
    assert meet == pytest.approx(37e9, rel=0.05)
    assert upcycled_loss(1e9, 74e9, meet) == pytest.approx(scratch_moe_loss(1e9, meet), rel=1e-3)
    assert upcycled_loss(1e9, 74e9, meet / 3) < scratch_moe_loss(1e9, meet / 3)
    # More sunk tokens are worth more, but never more than about themselves for models of this size.
    assert 1 < scratch_catches_up(1e9, 1e9) / 1e9 < 2
    assert scratch_catches_up(1e9, 3e11) < 3e11
    assert scratch_catches_up(1e8, 1e12) == math.inf


@pytest.mark.parametrize(("dense", "said"), [(2e12, "from 353B on"), (1e14, "at no number of them")])
def test_the_plan_says_where_upcycling_ends(dense: float, said: str) -> None:
    run = replace(load(mapping()), model=TANUKI_8X8B)
    assert f"from scratch is as good {said}" in advice(run, run_length(run), dense)
    with pytest.raises(ConfigError, match="--dense-tokens: is for a model that is upcycled"):
        advice(load(mapping()), run_length(run), dense)
