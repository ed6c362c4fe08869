"""From a run's configuration to a model that can be trained: the one builder of training, proofs and benchmarks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer

from megatron_ext.checkpoint.shards import TensorShard
from megatron_ext.config import (
    AdamConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    Precision,
    RecomputeConfig,
    RuntimeConfig,
    TaskConfig,
    TrainConfig,
)
from megatron_ext.config.preference import adapters_as, trained_as
from megatron_ext.mcore.adapters.plan import adapter_plan, freeze_base, is_adapter
from megatron_ext.mcore.fp8.histories import AmaxHistories, delayed_scalings
from megatron_ext.mcore.fp8.kept_weights import KeptWeights, keeping_scalings
from megatron_ext.mcore.initialization import initialize_weights
from megatron_ext.mcore.model import LanguageModel, build_chunks, routers, wrap_chunks
from megatron_ext.mcore.moe.steps import RouterSteps
from megatron_ext.mcore.optimizer import build_optimizer, multiply_learning_rates
from megatron_ext.mcore.state import model_shards
from megatron_ext.mcore.step_state import StepParticipant
from megatron_ext.mcore.transformer_config import LayerConfig, transformer_config
from megatron_ext.runtime.process_groups import Groups
from megatron_ext.runtime.seeds import seed_everything


class Buildable(Protocol):
    """The sections of a run that decide what is built; a RunConfig has them, and so has a cell of proving/parity.py."""

    @property
    def model(self) -> ModelConfig:
        """The architecture."""

    @property
    def parallel(self) -> ParallelConfig:
        """How it is split over processes."""

    @property
    def adapters(self) -> LoraConfig | None:
        """What is trained in place of the weights."""

    @property
    def precision(self) -> Precision:
        """Number formats."""

    @property
    def recompute(self) -> RecomputeConfig:
        """Activation recompute."""

    @property
    def optimizer(self) -> AdamConfig:
        """The optimizer."""

    @property
    def train(self) -> TrainConfig:
        """Its seed is that of the weights and of dropout."""

    @property
    def task(self) -> TaskConfig:
        """What it is trained for: some tasks leave out of account what a model has beside its weights."""

    @property
    def runtime(self) -> RuntimeConfig:
        """Its backend builds the layers."""


@dataclass(frozen=True)
class Trainable:
    """One rank's part of a model, ready for `training.step.train_step`."""

    chunks: list[LanguageModel]
    """Model chunks as built (one without virtual pipeline stages); their weights are what is saved."""
    wrapped: list[Any]
    """The same chunks wrapped for mixed precision and data parallelism."""
    optimizer: ChainedOptimizer
    config: LayerConfig
    """megatron-core's configuration, which its schedules read."""
    participants: tuple[StepParticipant, ...]
    """What moves with the steps beside weights and optimizer; the same kinds in the same order on every rank of a
    pipeline stage."""
    has_frozen_base: bool = False
    """Whether only what was added to a base model is trained; its checkpoints hold no more."""

    def saved_weights(self) -> list[TensorShard]:
        """Of the model's weights, what a checkpoint of its training holds."""
        shards = model_shards(list(self.chunks))
        return [shard for shard in shards if is_adapter(shard.key)] if self.has_frozen_base else shards

    def base_weights(self) -> list[TensorShard]:
        """The weights that are loaded from elsewhere before training begins."""
        return [shard for shard in model_shards(list(self.chunks)) if not is_adapter(shard.key)]

    def release(self) -> None:
        """Let go of the model, in a process that goes on without it; nothing here is of use afterwards.

        Gradient hooks know the wrapper, and kept activations know the hooks, by references inside torch that Python's
        garbage collector cannot follow: model and process groups would stay for as long as the process.
        """
        for chunk in self.wrapped:
            vars(chunk).clear()


def build_trainable(run: Buildable, groups: Groups, device: torch.device) -> Trainable:
    """Build the model of `run` on `device` with fresh weights, its optimizer, and all that moves with the steps.

    Seeds every generator of this process from `run.train.seed` on the way. Build after `split_process_group`.

    Raises:
        ConfigError: megatron-core refuses the model.
    """
    seed_everything(run.train.seed)
    model, adapters = trained_as(run.task, run.model), adapters_as(run.task, run.adapters)
    config = transformer_config(model, run.parallel, run.precision, run.recompute, run.runtime.backend)
    # On a CPU every order of sums is fixed already.
    config.deterministic_mode = config.deterministic_mode or (run.runtime.deterministic and device.type == "cuda")
    config.triton_kernels = run.runtime.kernels == "triton"
    config.compiles_router = run.runtime.compile_router
    parallel = run.parallel.settled(on_cuda=device.type == "cuda", copies=groups.dp_cp.size())
    config.adds_weight_gradients = (config.triton_kernels or device.type == "cpu") and not parallel.overlap_grad_reduce
    chunks = build_chunks(model, run.parallel, config, device, adapter_plan(model, adapters))
    initialize_weights(model, list(chunks), run.train.seed, adapters)
    if adapters is not None:
        freeze_base(chunks)
    if run.task.kind == "preference":
        for router in routers(chunks):
            router.hold_still()
    return make_trainable(run, groups, config, chunks)


def make_trainable(run: Buildable, groups: Groups, config: LayerConfig, chunks: list[LanguageModel]) -> Trainable:
    """Make `chunks`, whose weights are drawn, trainable: the second half of `build_trainable`, for other models."""
    on_cuda = any(parameter.is_cuda for chunk in chunks for parameter in chunk.parameters())
    parallel = run.parallel.settled(on_cuda=on_cuda, copies=groups.dp_cp.size())
    wrapped = wrap_chunks(chunks, config, parallel)
    optimizer = build_optimizer(_adam(run), parallel, run.precision, wrapped)
    if run.adapters is not None:
        multiply_learning_rates(optimizer, "is_adapter_output", run.adapters.lr_ratio)
    _tell_schedules(config, wrapped, overlap_grad_reduce=bool(parallel.overlap_grad_reduce))
    participants = _participants(chunks, is_writer=groups.stage.rank() == 0)
    return Trainable(chunks, wrapped, optimizer, config, participants, has_frozen_base=run.adapters is not None)


def _adam(run: Buildable) -> AdamConfig:
    """The optimizer's options for what is trained."""
    return run.optimizer if run.adapters is None else replace(run.optimizer, weight_decay=run.adapters.weight_decay)


def _tell_schedules(config: LayerConfig, wrapped: Sequence[Any], *, overlap_grad_reduce: bool) -> None:
    """Write into `config` how megatron-core's pipeline schedules reduce gradients."""
    config.finalize_model_grads_func = finalize_model_grads
    if overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]


def _participants(chunks: Sequence[torch.nn.Module], *, is_writer: bool) -> tuple[StepParticipant, ...]:
    """The participants of this rank's layers; a kind that has nothing here is left out."""
    found: list[StepParticipant] = []
    if gates := routers(chunks):
        found.append(RouterSteps(gates, is_writer=is_writer))
    if keeping := keeping_scalings(chunks):
        found.append(KeptWeights(keeping))
    if scalings := delayed_scalings(chunks):
        found.append(AmaxHistories(scalings, is_writer=is_writer))
    return tuple(found)
