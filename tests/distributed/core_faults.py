"""Shows each fault of megatron-core on the installed version: functions that answer whether it is there."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.config import Fp32Precision, ParallelConfig, RecomputeConfig, RuntimeConfig
from megatron_ext.errors import TrainingError
from megatron_ext.mcore import layer_specs, transformer_config
from megatron_ext.mcore.model import build_chunks, wrap_chunks
from megatron_ext.mcore.state import model_shards
from megatron_ext.proving.parity import Cell, Trajectory, build_cell, compare, run_cell, run_layout
from megatron_ext.runtime import cpu_compat
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.pool import GlooPool, WorkerFailure
from megatron_ext.testing.tiny import random_batch, tiny_model
from megatron_ext.training.step import train_step
from megatron_ext.training.tasks.pretrain import Pretrain
from tests.distributed.core_faults_architecture import ARCHITECTURE_FAULTS

MOE = tiny_model(moe=True)
TP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
# Real faults are orders of magnitude larger than this, rounding orders of magnitude smaller.
CLEAR = 1e-4
FP32 = Fp32Precision(kind="fp32")


def core_experts(backend: Any, model: Any) -> Any:
    """megatron-core's own experts in place of ours."""
    router = layer_specs.functools.partial(layer_specs.Router, model=model)
    linears = layer_specs._linears(backend)
    if layer_specs._SPECS_ARE_CALLABLES:
        experts = LocalSpecProvider().grouped_mlp_modules(False)
        shared = layer_specs.functools.partial(SharedExpertMLP, submodules=linears)
        submodules = layer_specs.MoESubmodules(experts=experts, shared_experts=shared, router=router)
        return layer_specs.functools.partial(layer_specs.MoELayer, submodules=submodules)
    module, parts = LocalSpecProvider().grouped_mlp_modules(False, False)
    submodules = layer_specs.MoESubmodules(
        experts=ModuleSpec(module=module, submodules=parts),
        shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=linears),
        router=router,
    )
    return ModuleSpec(module=layer_specs.MoELayer, submodules=submodules)


def train_with_core_experts(cell: Cell) -> Trajectory:
    with mock.patch.object(layer_specs, "_moe_mlp", core_experts):
        return run_cell(cell)


def expert_gradients_of_wrong_group(pool: GlooPool) -> bool:
    reference = pool.run(1, train_with_core_experts, Cell(MOE, ParallelConfig(), steps=2))[0]
    split = replace(TP2, expert_tensor_parallel_size=1)
    faulty = pool.run(2, train_with_core_experts, Cell(MOE, split, steps=2))[0]
    return compare(faulty, reference).worst > CLEAR


def train_with_batched_messages(cell: Cell) -> Trajectory:
    def batched(parallel: ParallelConfig) -> dict[str, Any]:
        return {**real(parallel), "batch_p2p_comm": True, "overlap_p2p_comm": False}

    real = transformer_config._parallelism
    with mock.patch.object(transformer_config, "_parallelism", batched):
        return run_cell(cell)


def interleaved_batched_messages(pool: GlooPool) -> bool:
    model = tiny_model()
    chunks = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    reference = run_layout(pool, Cell(model, ParallelConfig(), steps=2), 1)
    faulty = pool.run(2, train_with_batched_messages, Cell(model, chunks, steps=2))[0]
    return compare(faulty, reference).norm > CLEAR


def moe_needs_sequence_parallelism(pool: GlooPool) -> bool:
    try:
        pool.run(2, run_cell, Cell(MOE, ParallelConfig(tensor_model_parallel_size=2)))
    except WorkerFailure as failure:
        return "sequence parallelism" in str(failure)
    return False


def core_config(parallel: ParallelConfig, **fields: Any) -> TransformerConfig:
    """Groups and a configuration for megatron-core's own router."""
    split_process_group(parallel, RuntimeConfig(device="cpu"))
    seed_everything(0)
    return TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=4,
        num_moe_experts=4,
        moe_ffn_hidden_size=16,
        moe_router_topk=2,
        moe_aux_loss_coeff=1.0,
        add_bias_linear=False,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        **fields,
    )


class GatedRouter(TopKRouter):
    """megatron-core's router with a gate that works without Transformer Engine in every version."""

    def __init__(self, *, model: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.t()


def router_gradient(config: TransformerConfig, tokens: torch.Tensor) -> torch.Tensor:
    """Gradient of the balance loss alone with respect to the router's weight, tokens [S, B, H]."""
    router = GatedRouter(config=config, pg_collection=get_default_pg_collection())
    router.set_layer_number(1)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1)
    weights, _ = router(tokens)
    (weights * 0).sum().backward()
    return router.weight.grad


def some_tokens(sequence: int, batch: int) -> torch.Tensor:
    return torch.randn(sequence, batch, 16, generator=torch.Generator().manual_seed(3))


def per_token_gradient(parallel: ParallelConfig) -> list[float]:
    config = core_config(parallel, moe_router_load_balancing_type="aux_loss", calculate_per_token_loss=True)
    tokens = some_tokens(8, 1).chunk(parallel.tensor_model_parallel_size)[
        parallel_state.get_tensor_model_parallel_rank()
    ]
    gradient = router_gradient(config, tokens)
    dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
    return gradient.flatten().tolist()


def per_token_balance_loss_scale(pool: GlooPool) -> bool:
    return differ(pool.run(1, per_token_gradient, ParallelConfig())[0], pool.run(2, per_token_gradient, TP2)[0])


def unmarked_expert_counts() -> bool:
    """Whether each TP rank counts an expert parameter that, like Transformer Engine's, is not marked as split."""
    split_process_group(
        ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1),
        RuntimeConfig(device="cpu"),
    )
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.allreduce = False
    groups = [parallel_state.get_tensor_model_parallel_group()]
    if "expert_tp_group" in param_is_not_tensor_parallel_duplicate.__code__.co_varnames:
        groups.append(parallel_state.get_expert_tensor_parallel_group())
    return bool(param_is_not_tensor_parallel_duplicate(weight, *groups))


def experts_left_out_of_gradient_norm(pool: GlooPool) -> bool:
    return not all(pool.run(2, unmarked_expert_counts))


def sequence_loss_gradient(micro_batch: int) -> list[float]:
    """The gradient that two samples give, together or one by one; summed over tokens it must be the same."""
    config = core_config(ParallelConfig(), moe_router_load_balancing_type="seq_aux_loss", calculate_per_token_loss=True)
    parts = some_tokens(8, 2).split(micro_batch, dim=1)
    return sum(router_gradient(config, part) for part in parts).flatten().tolist()


def sequence_balance_loss_scale(pool: GlooPool) -> bool:
    return differ(pool.run(1, sequence_loss_gradient, 1)[0], pool.run(1, sequence_loss_gradient, 2)[0])


def global_loss_gradient() -> list[float]:
    """The gradient averaged over data-parallel ranks, as training averages it."""
    config = core_config(ParallelConfig(), moe_router_load_balancing_type="global_aux_loss")
    tokens = some_tokens(8, 2).chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
    gradient = router_gradient(config, tokens)
    dist.all_reduce(gradient)
    return (gradient / dist.get_world_size()).flatten().tolist()


def global_balance_loss_scale(pool: GlooPool) -> bool:
    return differ(pool.run(1, global_loss_gradient)[0], pool.run(2, global_loss_gradient)[0])


def differ(a: list[float], b: list[float]) -> bool:
    x, y = torch.tensor(a), torch.tensor(b)
    return bool((x - y).abs().max() > CLEAR * x.abs().max())


def evaluation_is_jittered() -> bool:
    config = core_config(ParallelConfig(), moe_input_jitter_eps=0.1)
    router = TopKRouter(config=config, pg_collection=get_default_pg_collection()).eval()
    tokens = some_tokens(8, 1)
    return not torch.equal(router.apply_input_jitter(tokens), tokens)


def jitter_in_evaluation(pool: GlooPool) -> bool:
    return pool.run(1, evaluation_is_jittered)[0]


def fp8_context_does_nothing() -> bool:
    config = core_config(ParallelConfig())
    config.fp8 = "hybrid"
    return isinstance(get_fp8_context(config), nullcontext)


def fp8_silently_off(pool: GlooPool) -> bool:
    return pool.run(1, fp8_context_does_nothing)[0]


def learning_rate_of_the_checkpoint(pool: GlooPool) -> bool:
    scheduler = mock.Mock(max_lr=1e-4, min_lr=0.0, lr_warmup_steps=0, lr_decay_style="constant", num_steps=5)
    return OptimizerParamScheduler.get_lr(scheduler, {"max_lr": 9e-4, "min_lr": 0.0}) != 1e-4


def core_gating_fails() -> bool:
    config = core_config(ParallelConfig(), moe_router_dtype="fp32")
    router = TopKRouter(config=config, pg_collection=get_default_pg_collection())
    try:
        router.gating(some_tokens(8, 1))
    except NameError:
        return True
    return False


def router_needs_transformer_engine(pool: GlooPool) -> bool:
    return pool.run(1, core_gating_fails)[0]


def train_with_norm_recompute(cell: Cell) -> Trajectory:
    selective = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
    with mock.patch.object(transformer_config, "_recompute", return_value=selective):
        return run_cell(cell)


def norm_recompute_needs_transformer_engine(pool: GlooPool) -> bool:
    try:
        pool.run(1, train_with_norm_recompute, Cell(MOE, ParallelConfig(), steps=1))
    except WorkerFailure as failure:
        return "FP8GlobalStateManager" in str(failure)
    return False


def torch_adam_fails_to_load() -> bool:
    parallel, precision = ParallelConfig(), FP32
    split_process_group(parallel, RuntimeConfig(device="cpu"))
    seed_everything(0)
    config = transformer_config.transformer_config(tiny_model(), parallel, precision, RecomputeConfig())
    chunks = build_chunks(tiny_model(), parallel, config, torch.device("cpu"))
    wrapped = wrap_chunks(chunks, config, parallel)
    settings = OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True)
    with cpu_compat.cuda_type_names():
        optimizer = get_megatron_optimizer(settings, wrapped, use_gloo_process_groups=False)
    assert model_shards(list(chunks))
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
    try:
        optimizer.sharded_state_dict(chunks[0].sharded_state_dict(), is_loading=True, metadata=metadata)
    except (AssertionError, KeyError):
        return True
    return False


def torch_adam_cannot_resume(pool: GlooPool) -> bool:
    return pool.run(2, torch_adam_fails_to_load)[0]


def expert_bias_moves() -> bool:
    overrides = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
    model = tiny_model(moe=True, transformer_overrides=overrides)
    with (
        mock.patch.object(transformer_config, "check_overrides"),
        mock.patch.object(layer_specs, "Router", GatedRouter),
    ):
        trainable, groups = build_cell(Cell(model, ParallelConfig(), seed=0))
    batch = random_batch(0, samples=2, micro_batch=1, dp_rank=0, dp_size=1)
    with mock.patch("megatron_ext.training.step.gradient_norm", return_value=math.nan):
        try:
            train_step(trainable, Pretrain(), batch, groups, max_norm=1.0)
        except TrainingError:
            return any(bool(m.expert_bias.any()) for m in trainable.chunks[0].modules() if isinstance(m, GatedRouter))
    return False


def expert_bias_moves_without_a_step(pool: GlooPool) -> bool:
    return pool.run(1, expert_bias_moves)[0]


def core_norm_refuses() -> bool:
    config = core_config(TP2)
    config.persist_layer_norm = False
    try:
        WrappedTorchNorm(config, 16)
    except AssertionError as error:
        return "sequence parallel" in str(error)
    return False


def norm_refuses_sequence_parallelism(pool: GlooPool) -> bool:
    return all(pool.run(2, core_norm_refuses))


def core_attention_refuses() -> bool:
    config = core_config(ParallelConfig(context_parallel_size=2))
    config.context_parallel_size = 2
    try:
        DotProductAttention(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
    except AssertionError as error:
        return "Context parallelism" in str(error)
    return False


def attention_refuses_context_parallelism(pool: GlooPool) -> bool:
    return all(pool.run(2, core_attention_refuses))


SHOWN: dict[str, Callable[[GlooPool], bool]] = {
    function.__name__: function
    for function in (
        expert_gradients_of_wrong_group,
        interleaved_batched_messages,
        moe_needs_sequence_parallelism,
        per_token_balance_loss_scale,
        experts_left_out_of_gradient_norm,
        sequence_balance_loss_scale,
        global_balance_loss_scale,
        jitter_in_evaluation,
        expert_bias_moves_without_a_step,
        fp8_silently_off,
        learning_rate_of_the_checkpoint,
        router_needs_transformer_engine,
        norm_recompute_needs_transformer_engine,
        torch_adam_cannot_resume,
        norm_refuses_sequence_parallelism,
        attention_refuses_context_parallelism,
        *ARCHITECTURE_FAULTS,
    )
}
