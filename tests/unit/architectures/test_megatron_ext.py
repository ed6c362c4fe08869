"""The tables of our own class: what a config.json may say, and what is refused by name."""

import inspect
from typing import Any

import pytest

from megatron_ext.architectures.own import MEGATRON_EXT
from megatron_ext.architectures.tables.fields import config_to_hf, config_to_megatron
from megatron_ext.architectures.tables.own_fields import Training
from megatron_ext.config.model_fields import EXPERT_FIELDS
from megatron_ext.errors import ConversionError
from megatron_ext.testing.tiny import tiny_model


def said(**changes: Any) -> dict[str, Any]:
    return config_to_hf(MEGATRON_EXT.config, tiny_model(moe=True)) | changes


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"norm_type": "batch"}, "norm_type = 'batch': expected one of 'rms_norm', 'layer_norm'"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi'"),
        ({"scoring_func": "tanh"}, "moe_router_score_function"),
        ({"router_noise": {"kind": "pink"}}, "moe_router_noise"),
        ({"kv_lora_rank": 8, "head_dim": 16}, "v_head_dim"),
        ({"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}, "head_dim = 16: .* is 12"),
        ({"kv_lora_rank": 8, "head_dim": None}, "num_key_value_heads = 2: in latent attention"),
        ({"megatron_training": {"weight_decay": 0.1}}, "megatron_training: weight_decay: not understood"),
        ({"megatron_training": 3}, "megatron_training = 3: expected a mapping"),
        ({"attention_gates": 4}, "attention_gates = 4: may change the model and is not understood"),
        ({"layer_types": ["sliding_attention"] * 4}, r"sliding_attention without a window \(sliding_window\)"),
    ],
)
def test_what_no_model_can_be_is_refused_by_name(changes: dict[str, Any], complaint: str) -> None:
    if "v_head_dim" in complaint:
        changes = changes | {"num_key_value_heads": None, "head_dim": None}
    with pytest.raises(ConversionError, match=complaint):
        config_to_megatron(MEGATRON_EXT.config, said(**changes), source="config.json")


def test_absent_fields_mean_what_the_class_means() -> None:
    """A config.json with the sizes alone is a dense Llama, here as in the class that transformers builds."""
    from megatron_ext.model_io.huggingface.modeling.configuration_megatron_ext import MegatronExtConfig

    sizes = {
        "vocab_size": 250,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    model = config_to_megatron(MEGATRON_EXT.config, sizes, source="config.json")
    theirs = MegatronExtConfig(**sizes).to_dict()
    ours = config_to_hf(MEGATRON_EXT.config, model)
    differing = {name: (theirs[name], ours[name]) for name in ours if name in theirs and theirs[name] != ours[name]}
    # What only training reads is written out in full.
    assert set(differing) == {"megatron_training"}


def test_what_only_models_with_experts_have_is_what_the_fields_say() -> None:
    from megatron_ext.model_io.huggingface.modeling import configuration_megatron_ext as shipped

    rules = [rule for rule in MEGATRON_EXT.config if not isinstance(rule, Training)]
    of_experts = {name for rule in rules if EXPERT_FIELDS.issuperset(rule.megatron_names()) for name in rule.hf_names()}
    said = inspect.signature(shipped.MegatronExtConfig).parameters
    assert {name: said[name].default for name in of_experts - {"num_experts"}} == shipped.MOE_ONLY
