"""Canonical names against what checkpoints of both backends and several vintages store."""

import pytest
import torch

from megatron_ext.canonical.catalogue import model_shapes
from megatron_ext.canonical.naming import StorageLocation, storage_plan, stored_names
from megatron_ext.canonical.seeds import seed_from_name
from megatron_ext.config import ModelConfig, MultiLatentAttention
from megatron_ext.testing.tiny import tiny_model

LATENT = MultiLatentAttention(kv_lora_rank=24, q_lora_rank=40, qk_head_dim=16, qk_pos_emb_head_dim=8, v_head_dim=12)
BIASED = {"normalization": "LayerNorm", "add_bias_linear": True, "position_embedding_type": "learned_absolute"}


@pytest.mark.parametrize(
    "model",
    [
        tiny_model(moe=True),
        tiny_model(moe=True, **BIASED, qk_layernorm="head"),
        tiny_model(moe=True, num_query_groups=None, multi_latent_attention=LATENT, normalization="LayerNorm"),
    ],
    ids=["plain", "biases", "latent"],
)
def test_storage_plan_and_stored_names_are_inverse(model: ModelConfig) -> None:
    shapes = model_shapes(model)
    plan = storage_plan(shapes)
    stored = {place.key: shape for place, shape in plan.values()}
    assert stored_names(stored) == {name: place for name, (place, _) in plan.items()}


def test_dense_norms_have_the_fused_names_and_moe_norms_their_own() -> None:
    plan = storage_plan(model_shapes(tiny_model(moe=True)))
    assert (
        plan["decoder.layers.0.pre_mlp_layernorm.weight"][0].key == "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
    )
    assert plan["decoder.layers.1.pre_mlp_layernorm.weight"][0].key == "decoder.layers.1.pre_mlp_layernorm.weight"
    assert (
        plan["decoder.layers.1.input_layernorm.weight"][0].key
        == "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    )


def test_norms_are_fused_where_transformer_engine_fuses_them() -> None:
    biased = storage_plan(model_shapes(tiny_model(**BIASED, qk_layernorm="head")))
    layer = "decoder.layers.0"
    assert biased[f"{layer}.input_layernorm.bias"][0].key == f"{layer}.self_attention.linear_qkv.layer_norm_bias"
    assert biased[f"{layer}.self_attention.q_layernorm.bias"][0].key == f"{layer}.self_attention.q_layernorm.bias"
    latent = storage_plan(model_shapes(tiny_model(num_query_groups=None, multi_latent_attention=LATENT)))
    assert latent[f"{layer}.input_layernorm.weight"][0].key == f"{layer}.input_layernorm.weight"
    for norm, linear in (("q_layernorm", "linear_q_up_proj"), ("kv_layernorm", "linear_kv_up_proj")):
        stored = latent[f"{layer}.self_attention.{norm}.weight"][0]
        assert stored.key == f"{layer}.self_attention.{linear}.layer_norm_weight"


def test_optimizer_state_and_extra_state_are_no_weights() -> None:
    keys = {
        "optimizer.state.exp_avg.x": (3,),
        "decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1": (1,),
        "a.weight": (2,),
    }
    assert stored_names(keys) == {"a.weight": StorageLocation("a.weight")}


def test_layers_stacked_under_one_key_are_taken_apart() -> None:
    names = stored_names(
        {
            "decoder.layers.self_attention.linear_proj.weight": (2, 8, 8),
            "decoder.layers.mlp.experts.experts.linear_fc2.weight": (2, 3, 4, 4),
        }
    )
    assert names["decoder.layers.1.self_attention.linear_proj.weight"].index == (1,)
    assert names["decoder.layers.1.mlp.experts.2.linear_fc2.weight"].index == (1, 2)
    assert len(names) == 2 + 6


def test_seeds_depend_on_both_parts_and_are_stable() -> None:
    assert seed_from_name(1, "a") == seed_from_name(1, "a")
    assert len({seed_from_name(s, n) for s in (1, 2) for n in ("a", "b")}) == 4
    torch.Generator().manual_seed(seed_from_name(10**9, "decoder.layers.0.mlp.router.weight"))
