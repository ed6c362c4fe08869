"""Every field of the model says what it has an effect on, and what it says of weights is true of the catalogue."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_ext.canonical.catalogue import model_shapes
from megatron_ext.config import (
    AdaptiveAuxLoss,
    GatingNormalization,
    GumbelNoise,
    InputJitter,
    LearnedNoise,
    ModelConfig,
    MultiLatentAttention,
    YarnRopeScaling,
)
from megatron_ext.config.base import fields_of
from megatron_ext.config.effect import Effect, changes_logits, effect_of
from megatron_ext.config.effective_value import effective_value
from megatron_ext.config.load import section_types
from megatron_ext.config.model_fields import EXPERT_FIELDS, OUTSIDE_LOGITS, TRAINING_FIELDS, is_training_only
from megatron_ext.testing.tiny import tiny_model

LATENT = MultiLatentAttention(kv_lora_rank=24, q_lora_rank=40, qk_head_dim=16, qk_pos_emb_head_dim=8, v_head_dim=12)
MODEL = tiny_model(moe=True)
OTHER: dict[str, Any] = {
    "num_layers": 5,
    "hidden_size": 32,
    "ffn_hidden_size": 80,
    "num_attention_heads": 8,
    "vocab_size": 500,
    "num_query_groups": 1,
    "kv_channels": 8,
    "max_position_embeddings": 128,
    "position_embedding_type": "learned_absolute",
    "rotary_base": 5e5,
    "rotary_percent": 0.5,
    "rope_scaling": YarnRopeScaling(kind="yarn", factor=2.0, original_max_position_embeddings=32),
    "multi_latent_attention": LATENT,
    "sliding_window": 8,
    "window_attn_skip_freq": 2,
    "attention_sinks": True,
    "qk_layernorm": "head",
    "normalization": "LayerNorm",
    "layernorm_epsilon": 1e-6,
    "activation_func": "gelu",
    "gated_linear_unit": False,
    "activation_func_clamp_value": 7.0,
    "glu_linear_offset": 1.0,
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "embedding_scale": 2.0,
    "untie_embeddings_and_output_weights": False,
    "make_vocab_size_divisible_by": 128,
    "num_moe_experts": 8,
    "moe_ffn_hidden_size": 32,
    "moe_router_topk": 1,
    "moe_router_score_function": "sigmoid",
    "moe_router_pre_softmax": True,
    "moe_router_norm_topk_prob": True,
    "moe_router_topk_scaling_factor": 2.0,
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
    "moe_router_group_score": "max",
    "moe_router_linear_bias": True,
    "moe_router_enable_expert_bias": True,
    "moe_router_noise": LearnedNoise(kind="learned"),
    "moe_gating_normalization": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": True,
    "moe_first_k_dense": 2,
    "moe_layer_freq": 2,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "init_method_std": 0.1,
    "output_z_loss_coeff": 1e-4,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 1e-3,
    "moe_adaptive_aux_loss": AdaptiveAuxLoss(),
    "moe_z_loss_coeff": 1e-3,
    "moe_expert_capacity_factor": 1.0,
    "moe_token_drop_policy": "position",
    "moe_pad_expert_input_to_capacity": True,
    "moe_router_bias_update_rate": 1e-2,
    "transformer_overrides": {"fp32_residual_connection": True},
}
"""Another value of each field than MODEL has."""


def sections(cls: type, path: str) -> Iterator[tuple[str, Any]]:
    """Every field of a section and of those below it, by its key."""
    for name, info in fields_of(cls).items():
        yield f"{path}.{name}", info
        for section in section_types(info.annotation):
            yield from sections(section, f"{path}.{name}[{section.__name__}]")


def test_every_field_of_the_model_is_tagged_and_explained() -> None:
    found = dict(sections(ModelConfig, "model"))
    assert len(found) > 80
    untagged = [key for key, info in found.items() if effect_of(info) is None]
    assert not untagged, "declare it with shapes_weights, shapes_function or training_only (config/effect.py)"
    assert not [key for key, info in found.items() if not info.description and not key.endswith(".kind")]


def test_another_value_of_every_field_is_tried() -> None:
    assert list(OTHER) == list(fields_of(ModelConfig))


@pytest.mark.parametrize("name", OTHER)
def test_a_field_shapes_weights_where_it_says_so(name: str) -> None:
    # A table of positions has the declared length; where positions are rotated, that is only declared.
    base = {"position_embedding_type": "learned_absolute"} if name == "max_position_embeddings" else {}
    if name == "multi_latent_attention":
        base = {"num_query_groups": None}
    model = dataclasses.replace(MODEL, **base)
    assert getattr(model, name) != OTHER[name]
    changed = model_shapes(dataclasses.replace(model, **{name: OTHER[name]})) != model_shapes(model)
    assert changed == (effect_of(fields_of(ModelConfig)[name]) is Effect.WEIGHTS)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(MultiLatentAttention)])
def test_a_field_of_latent_attention_shapes_weights_where_it_says_so(name: str) -> None:
    model = dataclasses.replace(MODEL, num_query_groups=None, multi_latent_attention=LATENT)
    latent = dataclasses.replace(LATENT, **{name: 2e-6 if name == "latent_norm_epsilon" else getattr(LATENT, name) + 2})
    changed = model_shapes(dataclasses.replace(model, multi_latent_attention=latent)) != model_shapes(model)
    assert changed == (effect_of(fields_of(MultiLatentAttention)[name]) is Effect.WEIGHTS)


def test_what_may_change_between_runs_is_what_only_training_reads() -> None:
    """The resumed run's freedom, spelled once more, so that a wrong tag shows."""
    assert (
        frozenset(
            "attention_dropout hidden_dropout init_method_std output_z_loss_coeff moe_router_load_balancing_type "
            "moe_aux_loss_coeff moe_adaptive_aux_loss moe_z_loss_coeff moe_expert_capacity_factor "
            "moe_token_drop_policy moe_pad_expert_input_to_capacity moe_router_bias_update_rate".split()
        )
        == TRAINING_FIELDS
    )
    assert {"make_vocab_size_divisible_by"} == OUTSIDE_LOGITS - TRAINING_FIELDS
    assert {name for name in fields_of(ModelConfig) if name.startswith("moe_")} | {"num_moe_experts"} == EXPERT_FIELDS


def test_a_section_is_of_training_alone_where_all_its_fields_are() -> None:
    assert is_training_only(GumbelNoise(kind="gumbel"))
    assert is_training_only(InputJitter(kind="input_jitter"))
    assert not is_training_only(LearnedNoise(kind="learned"))
    assert not is_training_only(GatingNormalization())
    assert not is_training_only(None)
    noisy = dataclasses.replace(MODEL, moe_router_noise=GumbelNoise(kind="gumbel"))
    assert effective_value(noisy, "moe_router_noise") is None
    assert changes_logits(fields_of(ModelConfig)["moe_router_noise"])
