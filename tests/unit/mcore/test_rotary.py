"""Inverse frequencies and attention factors against transformers' ROPE_INIT_FUNCTIONS, at the sizes of real models."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_ext.config import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    YarnRopeScaling,
)
from megatron_ext.mcore.rotary import (
    LatentRotaryEmbedding,
    RotaryEmbedding,
    attention_factor,
    inverse_frequencies,
    set_rotary_base,
)
from megatron_ext.testing.tiny import tiny_model

LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
DEEPSEEK = {"factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
# kind, its parameters, theta, share of the 128 dimensions that is rotated, length of the sequence
CASES: dict[str, tuple[Any, dict[str, float], float, float, int]] = {
    "linear": (LinearRopeScaling, {"factor": 4.0}, 10000.0, 1.0, 8192),
    "dynamic, long": (DynamicRopeScaling, {"factor": 4.0}, 10000.0, 1.0, 12000),
    "dynamic, short": (DynamicRopeScaling, {"factor": 4.0}, 10000.0, 1.0, 100),
    "Llama 3.1": (Llama3RopeScaling, LLAMA31, 500000.0, 1.0, 131072),
    "DeepSeek-V3": (YarnRopeScaling, DEEPSEEK | {"mscale": 1.0, "mscale_all_dim": 1.0}, 10000.0, 0.5, 163840),
    "DeepSeek-V2": (YarnRopeScaling, DEEPSEEK | {"mscale": 0.707, "mscale_all_dim": 0.3}, 10000.0, 0.5, 163840),
    "Qwen2.5 yarn": (YarnRopeScaling, DEEPSEEK | {"factor": 4.0}, 1000000.0, 1.0, 131072),
    "one mscale": (YarnRopeScaling, DEEPSEEK | {"mscale": 0.5}, 10000.0, 1.0, 4096),
    "gpt-oss": (YarnRopeScaling, DEEPSEEK | {"factor": 32.0, "truncate": False}, 150000.0, 1.0, 131072),
    "partial": (LinearRopeScaling, {"factor": 2.0}, 10000.0, 0.25, 4096),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_factor_are_transformers(name: str) -> None:
    scaling_class, parameters, theta, percent, length = CASES[name]
    kind = scaling_class.__dataclass_fields__["kind"].type.__args__[0]
    model = ModelConfig(
        num_layers=1,
        hidden_size=256,
        ffn_hidden_size=8,
        num_attention_heads=2,
        vocab_size=8,
        rotary_base=theta,
        rotary_percent=percent,
        rope_scaling=scaling_class(kind=kind, **parameters),
    )
    rope = {"rope_type": kind, "rope_theta": theta, "partial_rotary_factor": percent, **parameters}
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, max_position_embeddings=4096, rope_parameters=rope)
    expected, factor = ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=length)
    measured = inverse_frequencies(model, length)
    error = float(((measured - expected) / expected).abs().max())
    print(f"{name}: relative error of a frequency {error:.1e}")
    # Products in another order: a few roundings of fp32.
    assert error < 3e-7
    assert attention_factor(model) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("kind", [RotaryEmbedding, LatentRotaryEmbedding])
def test_another_base_turns_every_length_anew(kind: Any) -> None:
    def embedding(base: float) -> Any:
        alone: Any = SimpleNamespace(size=lambda: 1)
        return kind(tiny_model(rotary_base=base), SimpleNamespace(rotary_interleaved=False), alone)

    def angles(embedding: Any) -> torch.Tensor:
        return torch.cat([RotaryEmbedding.forward(embedding, length) for length in (16, 32)])

    changed, low, high = embedding(1e4), angles(embedding(1e4)), angles(embedding(5e5))
    assert torch.equal(angles(changed), low)  # and kept from call to call
    set_rotary_base([torch.nn.Sequential(changed)], 5e5)
    assert torch.equal(angles(changed), high)
    set_rotary_base([torch.nn.Sequential(changed)], 1e4)
    assert torch.equal(angles(changed), low)
    assert not torch.equal(low, high)
