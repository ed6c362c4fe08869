"""The catalogue of tensors against the networks that are really built, in every dimension that splits them."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ext.canonical.catalogue import Normal, model_tensors
from megatron_ext.canonical.naming import StorageLocation, tensors_by_location
from megatron_ext.canonical.placement import elements_held, stages_of
from megatron_ext.config import LearnedNoise, ModelConfig, MultiLatentAttention, ParallelConfig, TrainConfig
from megatron_ext.config.layout import resolve_layout
from megatron_ext.errors import TrainingError
from megatron_ext.mcore.initialization import _entry
from megatron_ext.mcore.state import ParameterShard, shards_of
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from tests.unit.mcore.our_network import build

ROUTER: dict[str, Any] = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_noise": LearnedNoise(kind="learned"),
    "moe_shared_expert_gate": True,
}
MODELS = [
    tiny_model(
        moe=True,
        add_bias_linear=True,
        normalization="LayerNorm",
        position_embedding_type="learned_absolute",
        qk_layernorm="projection",
        untie_embeddings_and_output_weights=False,
        **ROUTER,
    ),
    tiny_model(
        moe=True,
        num_query_groups=None,
        multi_latent_attention=MultiLatentAttention(
            kv_lora_rank=24, q_lora_rank=40, qk_head_dim=16, qk_pos_emb_head_dim=8, v_head_dim=12
        ),
    ),
    tiny_model(moe=True, num_layers=6),
]
STAGES = ParallelConfig(
    tensor_model_parallel_size=2,
    sequence_parallel=True,
    pipeline_model_parallel_size=2,
    virtual_pipeline_model_parallel_size=2,
)


LAYOUTS = [
    replace(STAGES, expert_tensor_parallel_size=2),
    replace(STAGES, expert_model_parallel_size=2, expert_tensor_parallel_size=1),
    replace(
        STAGES,
        expert_tensor_parallel_size=2,
        account_for_embedding_in_pipeline_split=True,
        account_for_loss_in_pipeline_split=True,
    ),
]


def held(model: ModelConfig, parallel: ParallelConfig) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Of each tensor that this rank has some of: how many elements, and the shape of one piece."""
    known, mine = tensors_by_location(model_tensors(model)), {}
    for chunk in build(model, parallel):
        for piece in (piece for pieces in shards_of(chunk).values() for piece in pieces):
            stacked = len(piece.global_shape) - piece.data.dim()
            name = known[StorageLocation(piece.key, piece.offset[:stacked])].name
            mine[name] = mine.get(name, (0,))[0] + piece.data.numel(), tuple(piece.data.shape)
    return mine


@pytest.mark.parametrize(
    ("model", "parallel"), zip(MODELS, LAYOUTS, strict=True), ids=["grouped-query ETP2", "latent EP2 ETP1", "uneven"]
)
def test_each_rank_holds_what_the_catalogue_places_there(
    model: ModelConfig, parallel: ParallelConfig, pool: GlooPool
) -> None:
    layout = resolve_layout(parallel, TrainConfig(train_iters=1, global_batch_size=4), 4)
    for rank, mine in enumerate(pool.run(4, held, model, parallel)):
        here, seen = layout.position(rank), set()
        for name, tensor in model_tensors(model).items():
            if tensor.is_expert:
                on_this_rank = int(name.split(".")[5]) * layout.ep // (model.num_moe_experts or 1) == here.ep
            else:
                on_this_rank = True
            if here.pp not in stages_of(tensor, model, parallel) or not on_this_rank:
                continue
            seen.add(name)
            count, shape = mine[name]
            assert count == elements_held(tensor, layout) * (layout.ep if tensor.is_expert else 1), name
            if tensor.tp_dimension == 1:
                assert shape == (tensor.shape[0], tensor.shape[1] // (layout.etp if tensor.is_expert else layout.tp))
            else:
                assert shape[1:] == tensor.shape[1:], name
        assert set(mine) == seen


def test_initial_values_are_megatrons() -> None:
    std, model = 0.02, MODELS[0]
    initial = {name: tensor.initial for name, tensor in model_tensors(model).items()}
    values = {name: (one.mean, one.std) for name, one in initial.items() if isinstance(one, Normal)}
    layer = "decoder.layers.1"
    for name in ("self_attention.linear_proj", "mlp.experts.3.linear_fc2", "mlp.shared_experts.linear_fc2"):
        assert values[f"{layer}.{name}.weight"] == (0.0, std / math.sqrt(2 * model.num_layers))
    for name in ("mlp.router.weight", "mlp.experts.3.linear_fc1.weight", "mlp.shared_experts.gate_weight"):
        assert values[f"{layer}.{name}"] == (0.0, std)
    assert {value for name, value in values.items() if name.endswith(("bias", "noise_weight"))} == {(0.0, 0.0)}
    assert {value for name, value in values.items() if name.endswith("norm.weight")} == {(1.0, 0.0)}


def shard(key: str, shape: tuple[int, ...]) -> ParameterShard:
    return ParameterShard(key, shape, (0,) * len(shape), torch.empty(shape, device="meta"), 0, (0, 0, 0), 1)


@pytest.mark.parametrize(
    ("piece", "complaint"),
    [
        (shard("decoder.layers.0.mlp.linear_fc3.weight", (4, 4)), r"linear_fc3.weight \[\]: not in the catalogue"),
        (shard("decoder.layers.0.mlp.linear_fc2.weight", (64, 97)), r"\[64, 97\] in the network, and \[64, 96\] as"),
    ],
    ids=["unknown", "another shape"],
)
def test_a_parameter_that_the_catalogue_lacks_is_an_error(piece: ParameterShard, complaint: str) -> None:
    with pytest.raises(TrainingError, match=complaint):
        _entry(tensors_by_location(model_tensors(tiny_model())), piece)
