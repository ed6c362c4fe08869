"""No field of ModelConfig is lost silently: an architecture's table carries it, or an export is refused."""

from dataclasses import replace
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from megatron_ext.architectures.llama import LLAMA
from megatron_ext.architectures.mixtral import MIXTRAL
from megatron_ext.architectures.registry import ARCHITECTURES, architecture_for
from megatron_ext.config import GatingNormalization, GumbelNoise, LearnedNoise, ModelConfig, MultiLatentAttention
from megatron_ext.config.base import fields_of
from megatron_ext.config.model_fields import OUTSIDE_LOGITS
from megatron_ext.errors import ConversionError
from megatron_ext.testing.tiny import tiny_model

CARRIED = {name for a in ARCHITECTURES for rule in a.config for name in rule.megatron_names()}
NOT_LLAMA: dict[str, Any] = {
    "position_embedding_type": "learned_absolute",
    "rotary_percent": 0.5,
    "multi_latent_attention": MultiLatentAttention(kv_lora_rank=8, qk_head_dim=8, qk_pos_emb_head_dim=8, v_head_dim=8),
    "qk_layernorm": "head",
    "normalization": "LayerNorm",
    "gated_linear_unit": False,
    "add_qkv_bias": True,
    "embedding_scale": 2.0,
}
NOT_MIXTRAL: dict[str, Any] = {
    "add_bias_linear": True,
    "moe_router_score_function": "sigmoid",
    "moe_router_pre_softmax": True,
    "moe_router_topk_scaling_factor": 2.0,
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
    "moe_router_enable_expert_bias": True,
    "moe_router_noise": LearnedNoise(kind="learned"),
    "moe_gating_normalization": GatingNormalization(),
    "moe_shared_expert_gate": True,
    "moe_shared_expert_intermediate_size": 64,
}
MIXTRAL_LIKE = {
    "moe": True,
    "moe_gating_normalization": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_first_k_dense": 0,
}


def test_every_field_of_the_model_is_judged() -> None:
    """A field that no table carries is refused when set."""
    fields = set(fields_of(ModelConfig))
    assert fields - CARRIED - OUTSIDE_LOGITS <= {"embedding_scale", "moe_router_noise", "transformer_overrides"}


@pytest.mark.parametrize("name", NOT_LLAMA)
def test_what_a_dense_class_cannot_say_is_refused_by_name(name: str) -> None:
    model = replace(tiny_model(), **{name: NOT_LLAMA[name]})
    assert f"{name} = " in str(LLAMA.why_unsupported(model))
    with pytest.raises(ConversionError, match=f"LlamaForCausalLM does not compute .*: it cannot say {name} = "):
        architecture_for(model, "LlamaForCausalLM")


@pytest.mark.parametrize("name", NOT_MIXTRAL)
def test_what_a_moe_class_cannot_say_is_refused_by_name(name: str) -> None:
    assert MIXTRAL.why_unsupported(tiny_model(**MIXTRAL_LIKE)) is None
    model = tiny_model(**(MIXTRAL_LIKE | {name: NOT_MIXTRAL[name]}))
    assert f"{name} = " in str(MIXTRAL.why_unsupported(model))
    with pytest.raises(ConversionError, match=f"MixtralForCausalLM does not compute .*{name} = "):
        architecture_for(model, "MixtralForCausalLM")


def test_dense_and_moe_classes_keep_apart() -> None:
    assert LLAMA.why_unsupported(tiny_model(moe=True)) == "it has no experts"
    assert MIXTRAL.why_unsupported(tiny_model()) == "it has experts"
    assert "MoE layers 0111" in str(MIXTRAL.why_unsupported(tiny_model(moe=True)))


def test_noise_without_weights_is_no_part_of_an_export() -> None:
    architecture, _ = architecture_for(tiny_model(moe=True, moe_router_noise=GumbelNoise(kind="gumbel")))
    assert architecture.name == "megatron_ext"


def test_what_leaves_the_logits_alone_does_not_matter() -> None:
    model = tiny_model(attention_dropout=0.1, hidden_dropout=0.1, output_z_loss_coeff=1e-4, init_method_std=0.5)
    assert architecture_for(model)[0].name == "llama"


def test_a_stock_class_is_preferred_and_the_reason_given() -> None:
    assert architecture_for(tiny_model()) == (LLAMA, "LlamaForCausalLM, which reproduces the model exactly")
    architecture, why = architecture_for(tiny_model(**(MIXTRAL_LIKE | {"moe_shared_expert_intermediate_size": 64})))
    assert architecture.name == "megatron_ext"
    assert "transformers has no such model; the nearest is MixtralForCausalLM: it cannot say" in why
    assert why.endswith("moe_shared_expert_intermediate_size = 64)")


def test_unknown_classes_are_refused_with_the_known() -> None:
    with pytest.raises(ConversionError, match="FalconForCausalLM is not known; choose one of LlamaForCausalLM, "):
        architecture_for(tiny_model(), "FalconForCausalLM")


def test_every_class_that_transformers_lacks_says_where_its_code_is() -> None:
    lacking = [a for a in ARCHITECTURES if a.model_type not in CONFIG_MAPPING]
    assert [a.name for a in lacking] == ["deepseek_v1", "tanuki", "megatron_ext"]
    for architecture in lacking:
        assert {"AutoConfig", "AutoModelForCausalLM"} <= dict(architecture.auto_map).keys()
        assert (
            all(place.startswith(f"{architecture.remote}--") for _, place in architecture.auto_map) or architecture.code
        )


def test_foreign_code_is_chosen_on_request_only() -> None:
    tanuki = tiny_model(**(MIXTRAL_LIKE | {"moe_gating_normalization": GatingNormalization()}))
    assert architecture_for(tanuki)[0].name == "megatron_ext"
    architecture, why = architecture_for(tanuki, "TanukiForCausalLM")
    assert architecture.name == "tanuki"
    assert "its code is in weblab-GENIAC/Tanuki-8x8B-dpo-v1.0, which was not run" in why
