"""Two spellings of one model mean the same; another function does not."""

from typing import Any

import pytest

from megatron_ext.config import ModelConfig
from megatron_ext.config.effective_value import effective_value
from megatron_ext.model_io.open import differing_fields
from megatron_ext.testing.tiny import tiny_model


def test_overrides_that_change_the_function_make_another_model() -> None:
    a, b = tiny_model(), tiny_model(transformer_overrides={"fp32_residual_connection": True})
    assert [name for name, _, _ in differing_fields(a, b)] == ["transformer_overrides"]
    assert not list(
        differing_fields(a, tiny_model(transformer_overrides={"deterministic_mode": True}, hidden_dropout=0.1))
    )


def differ(a: ModelConfig, b: ModelConfig) -> list[str]:
    return [name for name in ModelConfig.__dataclass_fields__ if effective_value(a, name) != effective_value(b, name)]


EVERY = {"moe": True, "moe_first_k_dense": 0, "moe_layer_freq": 1, "moe_ffn_hidden_size": 48}


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({"moe": True}, {"moe": True, "moe_router_pre_softmax": True, "moe_router_norm_topk_prob": True}, []),
        ({"moe": True}, {"moe": True, "moe_router_pre_softmax": True}, ["moe_router_norm_topk_prob"]),
        ({"moe": True}, {"moe": True, "moe_router_topk_scaling_factor": 1.0}, []),
        (EVERY, {**EVERY, "ffn_hidden_size": 33}, []),
        ({"moe": True}, {"moe": True, "ffn_hidden_size": 33}, ["ffn_hidden_size"]),
        ({}, {"rotary_base": 99.0}, ["rotary_base"]),
        (
            {"position_embedding_type": "learned_absolute"},
            {"position_embedding_type": "learned_absolute", "rotary_base": 99.0},
            [],
        ),
        ({}, {"moe_router_topk": 1}, []),
        ({"sliding_window": 8}, {"sliding_window": 8, "window_attn_skip_freq": [1, 1, 1, 1]}, []),
        (
            {"sliding_window": 8, "window_attn_skip_freq": 2},
            {"sliding_window": 8, "window_attn_skip_freq": [1, 0, 1, 0]},
            [],
        ),
        ({}, {"sliding_window": 8, "window_attn_skip_freq": 1}, []),
        ({}, {"sliding_window": 8}, ["sliding_window", "window_attn_skip_freq"]),
    ],
)
def test_a_field_means_what_it_changes(one: dict[str, Any], other: dict[str, Any], expected: list[str]) -> None:
    assert differ(tiny_model(**one), tiny_model(**other)) == expected
