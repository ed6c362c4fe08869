"""Config tables in both directions, and the refusal of what they cannot say."""

import json
from typing import Any

import pytest
from transformers import LlamaConfig

from megatron_ext.architectures.fields import config_to_hf, config_to_megatron
from megatron_ext.architectures.llama import LLAMA
from megatron_ext.architectures.megatron_ext import MEGATRON_EXT
from megatron_ext.architectures.registry import architecture_for, architecture_of
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConversionError
from megatron_ext.testing.tiny import tiny_model


def same_model(a: ModelConfig, b: ModelConfig) -> bool:
    fields = (
        "num_layers hidden_size ffn_hidden_size num_attention_heads query_groups head_dim vocab_size rotary_base "
        "layernorm_epsilon untie_embeddings_and_output_weights max_position_embeddings num_moe_experts "
        "expert_ffn_hidden_size moe_router_topk moe_router_pre_softmax moe_router_topk_scaling_factor "
        "moe_gating_normalization moe_shared_expert_intermediate_size moe_layer_pattern"
    ).split()
    return all(getattr(a, name) == getattr(b, name) for name in fields)


@pytest.mark.parametrize(
    "model",
    [
        tiny_model(),
        tiny_model(untie_embeddings_and_output_weights=False, rotary_base=5e5, kv_channels=24),
        tiny_model(moe=True),
        tiny_model(
            moe=True, moe_router_pre_softmax=True, moe_router_topk_scaling_factor=2.5, moe_gating_normalization=None
        ),
    ],
)
def test_our_fields_survive_the_way_there_and_back(model: ModelConfig) -> None:
    architecture, _ = architecture_for(model)
    raw = json.loads(json.dumps(config_to_hf(architecture.config, model)))
    assert same_model(config_to_megatron(architecture.config, raw, source="t"), model)


def test_transformers_own_config_is_understood() -> None:
    raw = LlamaConfig(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80, rope_theta=5e5
    ).to_dict()
    model = config_to_megatron(LLAMA.config, {k: v for k, v in raw.items()}, source="t")
    assert (model.hidden_size, model.query_groups, model.rotary_base) == (48, 2, 5e5)


def test_old_and_new_rope_keys_are_written() -> None:
    raw = config_to_hf(LLAMA.config, tiny_model(rotary_base=5e5))
    assert raw["rope_theta"] == 5e5
    assert raw["rope_parameters"] == {"rope_theta": 5e5, "rope_type": "default"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"sliding_window": 512}, "sliding_window = 512: may change the model and is not understood"),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(change: dict[str, Any], expected: str) -> None:
    raw = config_to_hf(LLAMA.config, tiny_model()) | change
    with pytest.raises(ConversionError) as caught:
        config_to_megatron(LLAMA.config, raw, source="config.json")
    assert expected in str(caught.value)


def test_all_unknown_fields_come_in_one_message() -> None:
    raw = config_to_hf(LLAMA.config, tiny_model()) | {"sliding_window": 5, "hidden_act": "gelu"}
    with pytest.raises(ConversionError, match=r"(?s)sliding_window.*hidden_act"):
        config_to_megatron(LLAMA.config, raw, source="config.json")


def test_a_stock_class_is_preferred_and_the_reason_given() -> None:
    assert architecture_for(tiny_model())[0] is LLAMA
    architecture, why = architecture_for(tiny_model(moe=True))
    assert architecture is MEGATRON_EXT
    assert "not LlamaForCausalLM: it has no experts" in why


def test_unknown_architectures_are_named() -> None:
    with pytest.raises(ConversionError, match="FalconForCausalLM.*supported: LlamaForCausalLM, MegatronExtForCausalLM"):
        architecture_of({"architectures": ["FalconForCausalLM"]}, source="config.json")
