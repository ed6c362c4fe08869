"""No field of ModelConfig is lost silently: an architecture's table carries it, or an export is refused."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_ext.architectures.fields import NOT_IN_THE_LOGITS
from megatron_ext.architectures.registry import ARCHITECTURES, architecture_for
from megatron_ext.config import GumbelNoise, LearnedNoise, ModelConfig, MultiLatentAttention, YarnRopeScaling
from megatron_ext.config.load import fields_of
from megatron_ext.errors import ConversionError
from megatron_ext.testing.tiny import tiny_model

CARRIED = {name for a in ARCHITECTURES for rule in a.config for name in rule.megatron_names()}
OTHER_VALUES: dict[str, Any] = {
    "position_embedding_type": "learned_absolute",
    "rotary_percent": 0.5,
    "rope_scaling": YarnRopeScaling(kind="yarn", factor=2.0, original_max_position_embeddings=32),
    "multi_latent_attention": MultiLatentAttention(kv_lora_rank=8, qk_head_dim=8, qk_pos_emb_head_dim=8, v_head_dim=8),
    "qk_layernorm": "head",
    "normalization": "LayerNorm",
    "activation_func": "gelu",
    "gated_linear_unit": False,
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "embedding_scale": 2.0,
}
OF_THE_ROUTER: dict[str, Any] = {
    "moe_router_score_function": "sigmoid",
    "moe_router_norm_topk_prob": True,
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
    "moe_router_enable_expert_bias": True,
    "moe_router_noise": LearnedNoise(kind="learned"),
    "moe_shared_expert_gate": True,
}


def test_every_field_of_the_model_is_judged() -> None:
    """A field that no table carries is refused when set."""
    fields = set(fields_of(ModelConfig))
    left = fields - CARRIED - NOT_IN_THE_LOGITS - set(OTHER_VALUES) - set(OF_THE_ROUTER)
    # Selects among groups that are refused above.
    assert left <= {"moe_router_group_score"}
    assert fields >= NOT_IN_THE_LOGITS


@pytest.mark.parametrize("name", OF_THE_ROUTER)
def test_what_no_table_carries_of_a_router_is_refused_by_name(name: str) -> None:
    model = tiny_model(moe=True, **{name: OF_THE_ROUTER[name]})
    with pytest.raises(ConversionError, match=f"not MegatronExtForCausalLM: it cannot say {name} = "):
        architecture_for(model)


def test_noise_without_weights_is_no_part_of_an_export() -> None:
    architecture, _ = architecture_for(tiny_model(moe=True, moe_router_noise=GumbelNoise(kind="gumbel")))
    assert architecture.name == "megatron_ext"


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "MoE"])
@pytest.mark.parametrize("name", OTHER_VALUES)
def test_what_no_table_carries_is_refused_by_name(name: str, moe: bool) -> None:
    model = replace(tiny_model(moe=moe), **{name: OTHER_VALUES[name]})
    with pytest.raises(ConversionError, match=f"not MegatronExtForCausalLM: it cannot say {name} = "):
        architecture_for(model)


def test_what_leaves_the_logits_alone_does_not_matter() -> None:
    model = tiny_model(attention_dropout=0.1, hidden_dropout=0.1, output_z_loss_coeff=1e-4, init_method_std=0.5)
    assert architecture_for(model)[0].name == "llama"
