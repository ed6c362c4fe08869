"""The translation to megatron-core, the padded vocabulary in the loss, and initial weights that no layout changes."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.mlp import MLP

from megatron_ext.config import ModelConfig, ParallelConfig, RecomputeConfig, RuntimeConfig
from megatron_ext.errors import ConfigError
from megatron_ext.mcore.initialization import initialize_weights
from megatron_ext.mcore.layer_specs import block_spec
from megatron_ext.mcore.model import build_chunks
from megatron_ext.mcore.state import model_shards
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from tests.unit.mcore.our_network import FP32, build


def test_overrides_reach_megatron_and_are_checked() -> None:
    model = tiny_model(transformer_overrides={"fp32_residual_connection": True})
    assert transformer_config(model, ParallelConfig(), FP32, RecomputeConfig()).fp32_residual_connection is True
    with pytest.raises(ConfigError, match="did you mean 'fp32_residual_connection'"):
        transformer_config(
            tiny_model(transformer_overrides={"fp32_residual_conection": True}),
            ParallelConfig(),
            FP32,
            RecomputeConfig(),
        )


def test_what_our_modules_would_ignore_is_refused_all_at_once() -> None:
    overrides = {
        "window_size": [128, 0],
        "moe_latent_size": 7,
        "moe_layer_recomput": True,
        "fp32_residual_connection": "x",
    }
    with pytest.raises(ConfigError) as caught:
        transformer_config(tiny_model(transformer_overrides=overrides), ParallelConfig(), FP32, RecomputeConfig())
    message = str(caught.value)
    assert "window_size: windows and sinks are those of model.sliding_window" in message
    assert "moe_latent_size: feed-forward networks are plain or gated" in message
    assert "moe_layer_recomput: no such field in megatron-core; did you mean 'moe_layer_recompute'?" in message
    assert "fp32_residual_connection = 'x': must be <class 'bool'>" in message


GATES: list[dict[str, Any]] = [
    {"activation_func_clamp_value": 0.3},
    {"glu_linear_offset": 1.0},
    {"activation_func": "quick_gelu"},
]


def test_megatron_cores_fused_swiglu_stands_for_nothing_else() -> None:
    """Its kernel would leave out a limit and an offset; unfused, Transformer Engine's networks take them from here."""
    for fields, fused in (({}, True), *((gate, False) for gate in GATES)):
        model = tiny_model(position_embedding_type="learned_absolute", **fields)
        config = transformer_config(model, ParallelConfig(), FP32, RecomputeConfig(), "transformer_engine")
        assert config.bias_activation_fusion is fused
        assert config.activation_func_clamp_value == model.activation_func_clamp_value
        assert config.glu_linear_offset == model.glu_linear_offset


def difference_from_cores_network(model: ModelConfig) -> float:
    (chunk,) = build(model, ParallelConfig())
    network, hidden = chunk.decoder.layers[0].mlp, torch.randn(5, 2, model.hidden_size)
    torch.nn.init.normal_(network.linear_fc1.bias)
    with torch.no_grad():
        (ours, _), (theirs, bias) = network(hidden), MLP.forward(network, hidden)
        return float((ours - theirs - bias).abs().max() / ours.abs().max())


def test_gated_networks_are_megatron_cores(pool: GlooPool) -> None:
    """Which is what Transformer Engine's backend computes, in steps of torch."""
    fields = {name: value for gate in GATES for name, value in gate.items()}
    (difference,) = pool.run(1, difference_from_cores_network, tiny_model(add_bias_linear=True, **fields))
    print(f"{difference:.1e} of the largest output")
    assert difference < 1e-6  # rounding of fp32


def padded_loss() -> tuple[float, float]:
    model = tiny_model(vocab_size=250, make_vocab_size_divisible_by=64)
    (network,) = build(model, ParallelConfig())
    tokens = torch.randint(0, 250, (2, 17), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(16).expand(2, -1)
    loss = network(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
    logits = network(tokens[:, :-1], positions, None)[..., :250]
    return float(loss), float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def test_padding_takes_no_part_in_the_loss(pool: GlooPool) -> None:
    ((loss, expected),) = pool.run(1, padded_loss)
    assert loss == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def embeddings(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The embedding of some tokens, and the part of it that comes from their positions."""
    model = tiny_model(embedding_scale=scale, position_embedding_type="learned_absolute")
    (network,) = build(model, ParallelConfig())
    tokens, positions = torch.arange(32).view(2, 16), torch.arange(16).expand(2, -1)
    return network.embedding(tokens, positions), network.embedding.position_embeddings(positions).transpose(0, 1)


def test_the_embedding_scale_is_on_tokens_and_not_on_positions(pool: GlooPool) -> None:
    ((plain, positions),) = pool.run(1, embeddings, 1.0)
    ((scaled, _),) = pool.run(1, embeddings, 8.0)
    assert torch.allclose(scaled - positions, 8 * (plain - positions), atol=1e-6)


def saved_pieces(model: ModelConfig, parallel: ParallelConfig) -> dict[tuple[str, tuple[int, ...]], torch.Tensor]:
    shards = model_shards(build(model, parallel))
    return {(shard.key, shard.offset): shard.data.clone() for shard in shards if shard.is_writer}


def assemble(ranks: list[dict], shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    whole = {key: torch.full(shape, math.nan) for key, shape in shapes.items()}
    for pieces in ranks:
        for (key, offset), data in pieces.items():
            whole[key][tuple(slice(o, o + s) for o, s in zip(offset, data.shape, strict=True))] = data
    return whole


def global_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {shard.key: shard.global_shape for shard in model_shards(build(model, ParallelConfig()))}


def test_initial_weights_do_not_depend_on_the_layout(pool: GlooPool) -> None:
    model = tiny_model(moe=True)
    (shapes,) = pool.run(1, global_shapes, model)
    reference = assemble(pool.run(1, saved_pieces, model, ParallelConfig()), shapes)
    experts = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2)
    layouts = {
        "TP2 SP EP2 ETP2": (4, experts),
        "TP2 SP PP2 EP2 ETP1": (8, replace(experts, pipeline_model_parallel_size=2, expert_tensor_parallel_size=1)),
        "PP2 VPP2": (2, ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
    }
    for name, (processes, parallel) in layouts.items():
        whole = assemble(pool.run(processes, saved_pieces, model, parallel), shapes)
        assert all(torch.equal(whole[key], reference[key]) for key in shapes), name


def test_initial_weights_have_megatrons_scale(pool: GlooPool) -> None:
    model = tiny_model(moe=True, init_method_std=0.05)
    (shapes,) = pool.run(1, global_shapes, model)
    weights = assemble(pool.run(1, saved_pieces, model, ParallelConfig()), shapes)
    for key, weight in weights.items():
        if "norm" in key:
            assert (weight == 1).all()
        else:
            expected = 0.05 / math.sqrt(8) if key.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0.05
            assert float(weight.std()) == pytest.approx(expected, rel=0.15), key
    experts = weights["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"]
    assert not torch.equal(experts[0], experts[1])


def entries(chunk: Any) -> dict[str, Any]:
    """What a sharded state dict says of each of its tensors."""
    metadata = {"singleton_local_shards": False, "non_homogeneous_layers": True}
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    described = {}
    for entry in nested_values(chunk.sharded_state_dict(metadata=metadata)):
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for part in parts if isinstance(parts, list) else parts.values():
            offset = tuple(getattr(part, "global_offset", ()))
            described[part.key, offset] = (part.global_shape, part.replica_id, getattr(part, "allow_shape_mismatch", 0))
    return described


def beside_core(model: ModelConfig, parallel: ParallelConfig) -> list[tuple[bool, bool]]:
    """Of each chunk whether megatron-core's GPTModel describes the same tensors, and computes the same with them."""
    groups = split_process_group(parallel, RuntimeConfig(device="cpu"))
    seed_everything(0)
    config = transformer_config(model, parallel, FP32, RecomputeConfig())
    ours = build_chunks(model, parallel, config, torch.device("cpu"))
    initialize_weights(model, list(ours), 1)
    found = []
    for chunk in ours:
        core = GPTModel(
            config,
            block_spec(model, config, chunk.vp_stage),
            model.padded_vocab_size,
            model.max_position_embeddings,
            pre_process=chunk.pre_process,
            post_process=chunk.post_process,
            share_embeddings_and_output_weights=chunk.share_embeddings_and_output_weights,
            position_embedding_type=model.position_embedding_type,
            rotary_base=model.rotary_base,
            vp_stage=chunk.vp_stage,
        )
        core.load_state_dict(chunk.state_dict())
        tokens = torch.arange(32).view(2, 16)[:, : 16 // groups.cp.size()]
        arguments = (tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
        sent = torch.randn(tokens.shape[1], 2, model.hidden_size, generator=torch.Generator().manual_seed(0))
        for network in (chunk, core):
            network.eval().set_input_tensor([None if chunk.pre_process else sent])
        found.append((entries(chunk) == entries(core), torch.equal(chunk(*arguments), core(*arguments))))
    return found


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_model_is_what_megatron_cores_own_class_builds(tied: bool, pool: GlooPool) -> None:
    model = tiny_model(untie_embeddings_and_output_weights=not tied, make_vocab_size_divisible_by=8)
    learned = replace(model, position_embedding_type="learned_absolute")
    split = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    for case, processes, parallel in (
        (learned, 1, ParallelConfig()),
        (model, 2, ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
        (model, 4, ParallelConfig(**split)),
    ):
        assert all(chunk == (True, True) for rank in pool.run(processes, beside_core, case, parallel) for chunk in rank)
