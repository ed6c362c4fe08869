"""Canonical names against what checkpoints of both backends and several vintages store."""

import torch

from megatron_ext.checkpoint.naming import Stored, seed_from_name, storage_plan, stored_names
from megatron_ext.checkpoint.shapes import model_shapes
from megatron_ext.testing.tiny import tiny_model


def test_storage_plan_and_stored_names_are_inverse() -> None:
    shapes = model_shapes(tiny_model(moe=True))
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


def test_optimizer_state_and_extra_state_are_no_weights() -> None:
    keys = {
        "optimizer.state.exp_avg.x": (3,),
        "decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1": (1,),
        "a.weight": (2,),
    }
    assert stored_names(keys) == {"a.weight": Stored("a.weight")}


def test_layers_stacked_under_one_key_are_taken_apart() -> None:
    names = stored_names(
        {
            "decoder.layers.self_attention.linear_proj.weight": (2, 8, 8),
            "decoder.layers.mlp.experts.experts.linear_fc2.weight": (2, 3, 4, 4),
        }
    )
    assert names["decoder.layers.1.self_attention.linear_proj.weight"].stacked == (1,)
    assert names["decoder.layers.1.mlp.experts.2.linear_fc2.weight"].stacked == (1, 2)
    assert len(names) == 2 + 6


def test_seeds_depend_on_both_parts_and_are_stable() -> None:
    assert seed_from_name(1, "a") == seed_from_name(1, "a")
    assert len({seed_from_name(s, n) for s in (1, 2) for n in ("a", "b")}) == 4
    torch.Generator().manual_seed(seed_from_name(10**9, "decoder.layers.0.mlp.router.weight"))
