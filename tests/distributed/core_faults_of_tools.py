"""Shows faults of megatron-core beside its layers: in upcycling, saving, data and schedules. See core_faults.py."""

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import _build_shuffle_index
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import async_utils
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.upcycling_utils import upcycle_state_dict
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.config import (
    Fp32Precision,
    ModelConfig,
    ParallelConfig,
    RecomputeConfig,
    RuntimeConfig,
)
from megatron_ext.mcore import layer_specs
from megatron_ext.mcore.initialization import initialize_weights
from megatron_ext.mcore.model import build_chunks, wrap_chunks
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.proving.parity import Cell, build_cell
from megatron_ext.runtime import cpu_compat
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from tests.distributed.core_faults import core_experts

FP32 = Fp32Precision(kind="fp32")
DENSE = tiny_model()
MOE = tiny_model(moe=True, moe_first_k_dense=0, moe_ffn_hidden_size=96)


def start(parallel: ParallelConfig) -> None:
    split_process_group(parallel, RuntimeConfig(device="cpu"))
    seed_everything(0)


def network(model: ModelConfig, parallel: ParallelConfig) -> tuple[Any, Any]:
    """megatron-core's configuration and the model with megatron-core's own experts."""
    config = transformer_config(model, parallel, FP32, RecomputeConfig())
    with mock.patch.object(layer_specs, "_moe_mlp", core_experts):
        (chunk,) = build_chunks(model, parallel, config, torch.device("cpu"))
    initialize_weights(model, [chunk], 0)
    return config, chunk


def shared_experts_stay_behind() -> bool:
    start(ParallelConfig())
    moe, dense = network(MOE, ParallelConfig())[1], network(DENSE, ParallelConfig())[1]
    made = upcycle_state_dict([moe], [dense])["model"]
    shared = [(name, value) for name, value in moe.named_parameters() if "shared_experts" in name]
    assert shared
    # What the MoE model was initialised with, instead of anything of the dense one.
    return all(torch.equal(made[name], value) for name, value in shared)


def upcycling_leaves_shared_experts_random(pool: GlooPool) -> bool:
    return pool.run(1, shared_experts_stay_behind)[0]


def dense_layers_break_upcycling() -> bool:
    start(ParallelConfig())
    mixed = tiny_model(moe=True, moe_first_k_dense=1, moe_ffn_hidden_size=96)
    moe, dense = network(mixed, ParallelConfig())[1], network(DENSE, ParallelConfig())[1]
    try:
        upcycle_state_dict([moe], [dense])
    except AssertionError as error:
        return "not supported by upcycling" in str(error)
    return False


def upcycling_needs_every_layer_moe(pool: GlooPool) -> bool:
    return pool.run(1, dense_layers_break_upcycling)[0]


def two_chunks_break_upcycling() -> bool:
    start(ParallelConfig())
    moe, dense = network(MOE, ParallelConfig())[1], network(DENSE, ParallelConfig())[1]
    try:
        upcycle_state_dict([moe, moe], [dense, dense])
    except AttributeError:
        return True
    return False


def upcycling_swaps_models_of_several_chunks(pool: GlooPool) -> bool:
    return pool.run(1, two_chunks_break_upcycling)[0]


def upcycling_option_cannot_run(pool: GlooPool) -> bool:
    """There is no training script, or it calls its loader by a name that the loader does not know."""
    spec = importlib.util.find_spec("megatron.training")
    if spec is None:
        return True
    (folder,) = map(Path, spec.submodule_search_locations or ())
    loader = next(
        node
        for node in ast.parse((folder / "checkpointing.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "load_checkpoint"
    )
    known = {argument.arg for argument in (*loader.args.args, *loader.args.kwonlyargs)}
    given = {
        ast.literal_eval(key)
        for node in ast.walk(ast.parse((folder / "training.py").read_text()))
        if isinstance(node, ast.keyword) and node.arg == "load_kwargs" and isinstance(node.value, ast.Dict)
        for key in node.value.keys
        if key is not None
    }
    return not given <= known


def optimizer_state(metadata: dict[str, Any]) -> set[str]:
    """Keys under which megatron-core would save the tensors of the distributed optimizer, after one step."""
    config, chunk = network(DENSE, ParallelConfig())
    wrapped = wrap_chunks([chunk], config, ParallelConfig())
    settings = OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=0.0, use_distributed_optimizer=True)
    with cpu_compat.cuda_type_names():
        optimizer = get_megatron_optimizer(settings, wrapped, use_gloo_process_groups=False)
    wrapped[0].zero_grad_buffer()
    optimizer.step()
    state = optimizer.sharded_state_dict(chunk.sharded_state_dict(), is_loading=False, metadata=metadata)
    return {entry.key for entry in nested_values(state) if isinstance(entry, ShardedTensor)}


def default_sharding_fails() -> bool:
    start(ParallelConfig())
    try:
        optimizer_state({})
    except CheckpointingException as error:
        return "flattened_range is not supported" in str(error)
    return False


def default_optimizer_format_cannot_be_saved(pool: GlooPool) -> bool:
    return pool.run(2, default_sharding_fails)[0]


def buckets_are_saved() -> bool:
    start(ParallelConfig())
    keys = optimizer_state({"distrib_optim_sharding_type": "dp_reshardable"})
    return bool(keys) and not any("linear_qkv" in key for key in keys)


def reshardable_optimizer_format_is_bound_to_a_layout(pool: GlooPool) -> bool:
    """Its tensors are the buckets of one layout, not the states of parameters."""
    return pool.run(2, buckets_are_saved)[0]


def parts_of_the_optimizer(parallel: ParallelConfig) -> int:
    with mock.patch.object(layer_specs, "_moe_mlp", core_experts):
        trainable, _ = build_cell(Cell(MOE, parallel))
    return sum(bool(part.get_parameters()) for part in trainable.optimizer.chained_optimizers)


def optimizer_parts_follow_expert_parallelism(pool: GlooPool) -> bool:
    one = pool.run(2, parts_of_the_optimizer, ParallelConfig())[0]
    two = pool.run(2, parts_of_the_optimizer, ParallelConfig(expert_model_parallel_size=2))[0]
    return one != two


def lasting_saver_needs_a_gpu(pool: GlooPool) -> bool:
    with mock.patch.object(torch.cuda, "device_count", return_value=0):
        try:
            async_utils.PersistentAsyncCaller.async_loop(0, None, None, None)
        except ZeroDivisionError:
            return True
    return False


def samples_in_order(count: int) -> list[int]:
    return _build_shuffle_index(count, count, np.random.RandomState(7))[:8].tolist()


def sample_order_depends_on_length(pool: GlooPool) -> bool:
    return samples_in_order(100) != samples_in_order(200)


def padding_mask_means_its_opposite(pool: GlooPool) -> bool:
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    marked = torch.tensor([True, True, False, False])
    chosen, _ = compute_routing_scores_for_aux_loss(logits, 2, "softmax", padding_mask=marked)
    promised = "True for valid tokens" in (compute_routing_scores_for_aux_loss.__doc__ or "")
    return promised and not chosen[marked].any() and bool(chosen[~marked].any())


def loss_of_two_is_multiplied_by_context_ranks(pool: GlooPool) -> bool:
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=4)

    def loss(context_ranks: int) -> float:
        total, _ = forward_step_calc_loss(
            torch.nn.Module(),
            torch.ones(1),
            lambda output: (output * 3, output),
            config,
            vp_stage=None,
            collect_non_loss_data=False,
            num_microbatches=1,
            forward_data_store=[],
            cp_group_size=context_ranks,
            is_last_stage=True,
        )
        return float(total)

    return loss(2) == 2 * loss(1)


SHOWN: dict[str, Callable[[GlooPool], bool]] = {
    function.__name__: function
    for function in (
        upcycling_leaves_shared_experts_random,
        upcycling_needs_every_layer_moe,
        upcycling_swaps_models_of_several_chunks,
        upcycling_option_cannot_run,
        default_optimizer_format_cannot_be_saved,
        reshardable_optimizer_format_is_bound_to_a_layout,
        optimizer_parts_follow_expert_parallelism,
        lasting_saver_needs_a_gpu,
        sample_order_depends_on_length,
        padding_mask_means_its_opposite,
        loss_of_two_is_multiplied_by_context_ranks,
    )
}
