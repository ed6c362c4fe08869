"""Proves a user's own layout before a GPU is booked: the run, shrunk, trained on Gloo processes and in one process.

The shrunk model has the same layer pattern, experts, heads, router and features; only widths, vocabulary, sequence
and window are smaller. Layers and degrees of parallelism are kept where this machine can hold them and halved where it
cannot.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import psutil

from megatron_ext.config import (
    Fp32Precision,
    LoraConfig,
    ModelConfig,
    MultiLatentAttention,
    ParallelConfig,
    RecomputeConfig,
    RunConfig,
    smallest_world_size,
)
from megatron_ext.config.root import DERIVED
from megatron_ext.config.rules import violations
from megatron_ext.config.rules.backend import ONLY_WITH_TE
from megatron_ext.errors import ConfigError
from megatron_ext.proving.parity import Cell, Difference, Trajectory, compare, run_layout
from megatron_ext.proving.shapes import shrink_shapes
from megatron_ext.testing.pool import GlooPool

# Measured: a forked process that trains the shrunk model needs 80 to 150 MB of its own, and shares its libraries.
_BYTES_A_PROCESS = 250 * 2**20
_MOST_PROCESSES = 32
_MOST_LAYERS = 16
_STEPS = 5
_STEPS_A_STAGE = 3
# In a deep model of small random weights ten times as much lets differences grow a thousandfold in five steps.
_LEARNING_RATE = 1e-4
# Adam divides a gradient that is rounding alone by its own size, and moves such a weight by the whole learning rate, in
# each layout elsewhere: with the usual 1e-8 weights are up to 3e-3 of the largest apart after the first step, and soon
# a token between two experts goes to another one, whose gradients then differ wholly. With this one weights stay about
# as near as they are rounded; those whose gradients decide about the loss move as before.
_ADAM_EPS = 1e-5

# As in the parity grid: fp32 rounding shows as 1e-7 to 1e-6, real faults as 1e-4 and more.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class ProofPlan:
    """What will be trained, and in what it differs from the run besides its widths."""

    cell: Cell
    processes: int
    changes: tuple[str, ...]
    shapes: tuple[str, ...]
    """What the steps are like that the run has: those of the stages, where it has some."""
    unproven: tuple[str, ...]
    """What the run computes with and the proof does not."""


@dataclass(frozen=True)
class Proof:
    """Both trainings and how far they are apart."""

    plan: ProofPlan
    layout: Trajectory
    single: Trajectory

    @property
    def difference(self) -> Difference:
        """Largest relative differences over the steps."""
        return compare(self.layout, self.single)

    @property
    def holds(self) -> bool:
        """Whether the layout trains what one process trains."""
        return self.difference.worst < TOLERANCE


_SPLITS_LAYERS = frozenset(
    ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "pipeline_model_parallel_layout")
)


def processes_that_fit() -> int:
    """How many processes this machine can hold."""
    return max(1, min(_MOST_PROCESSES, int(psutil.virtual_memory().available * 0.8) // _BYTES_A_PROCESS))


def plan_proof(
    run: RunConfig, world_size: int | None, limit: int, *, most_layers: int = _MOST_LAYERS, steps: int | None = None
) -> ProofPlan:
    """Shrink `run` to at most `limit` processes.

    Args:
        world_size: processes of the real run; None takes the fewest its layout needs, twice that if that leaves no
            data parallelism.
        most_layers: kept of the model, where its pipeline stages go with so few.
        steps: of each kind that the run has. None: 5, and 3 of each where there are several.
    """
    fewest = smallest_world_size(run.parallel)
    data_parallel = fewest // _model_ranks(run.parallel)
    wanted = world_size or (fewest if data_parallel > 1 else 2 * fewest)
    if world_size:
        run.resolve(world_size)
    parallel, processes, changes = _fit_processes(run.parallel, run.model, wanted, limit)
    if run.runtime.device != "cpu":  # where it will run, this is on
        copies = processes // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
        parallel = parallel.settled(on_cuda=True, copies=copies)
    parallel, dispatch_changes = _provable_dispatch(parallel)
    model, layer_changes = _shrink_model(run.model, parallel, most_layers)
    model, loss_changes = _comparable_losses(model)
    adapters, adapter_changes = _without_dropout(run.adapters)
    data_ranks = processes // _model_ranks(parallel)
    shapes, names = shrink_shapes(run, parallel, data_ranks)
    longest = max(shape.length for shape in shapes)
    model = replace(
        model,
        max_position_embeddings=longest,
        rotary_base=shapes[0].rotary_base,
        sliding_window=_shrink_window(run, [shape.length for shape in shapes]),
    )
    cell = Cell(
        model,
        parallel,
        Fp32Precision(kind="fp32"),
        _fit_recompute(run, model, parallel),
        steps=steps or (_STEPS if len(shapes) == 1 else _STEPS_A_STAGE),
        lr=_LEARNING_RATE,
        adam_eps=_ADAM_EPS,
        samples=shapes[0].samples,
        micro_batch=shapes[0].micro_batch,
        length=shapes[0].length,
        seed=run.train.seed,
        documents=run.data.reset_attention_mask or run.task.reads != "text",
        task=run.task,
        stages=tuple(shapes[1:]),
        adapters=adapters,
    )
    _require_legal(cell)
    return ProofPlan(
        cell,
        processes,
        tuple(changes + dispatch_changes + layer_changes + loss_changes + adapter_changes),
        tuple(names),
        tuple(_unproven(run)),
    )


def prove(plan: ProofPlan, pool: GlooPool | None = None) -> Proof:
    """Train `plan` in its layout and in one process, from the same weights on the same data.

    Args:
        pool: processes that are there already, at least as many as the plan needs. None starts some for this proof.
    """
    model = plan.cell.model
    parallel = plan.cell.parallel
    data_ranks = plan.processes // _model_ranks(parallel)
    # The global balance loss sees the micro-batches of all data-parallel ranks at once: one process sees them so as one
    # larger micro-batch.
    together = data_ranks if "global_aux_loss" in model.balance_losses else 1
    single = replace(
        plan.cell,
        model=replace(model, transformer_overrides=model.function_overrides),
        micro_batch=plan.cell.micro_batch * together,
        stages=tuple(replace(shape, micro_batch=shape.micro_batch * together) for shape in plan.cell.stages),
        parallel=ParallelConfig(
            use_distributed_optimizer=False, moe_token_dispatcher_type=parallel.moe_token_dispatcher_type
        ),
    )
    workers: AbstractContextManager[GlooPool] = GlooPool(plan.processes) if pool is None else nullcontext(pool)
    with workers as some:
        reference = run_layout(some, single, 1)
        return Proof(plan, run_layout(some, plan.cell, plan.processes), reference)


def _model_ranks(parallel: ParallelConfig) -> int:
    """Ranks that share one sample."""
    return parallel.tensor_model_parallel_size * parallel.context_parallel_size * parallel.pipeline_model_parallel_size


def _fit_processes(
    parallel: ParallelConfig, model: ModelConfig, processes: int, limit: int
) -> tuple[ParallelConfig, int, list[str]]:
    """Lower data parallelism first, then halve the largest degree, until `processes` is at most `limit`."""
    original, started = parallel, processes
    while processes > limit:
        if (fewest := smallest_world_size(parallel)) <= limit:
            processes = limit // fewest * fewest
            break
        smaller = _halve_largest(parallel, model)
        if smaller is None:
            raise ConfigError(
                f"this machine holds {limit} processes; the layout needs at least {smallest_world_size(parallel)}"
            )
        parallel = smaller
        processes = smallest_world_size(parallel)
    changes = [
        f"parallel.{name}: {getattr(original, name)} -> {getattr(parallel, name)}"
        for name in ParallelConfig.__dataclass_fields__
        if getattr(original, name) != getattr(parallel, name)
    ]
    if processes != started:
        changes.insert(0, f"processes: {started} -> {processes}, what this machine holds")
    return parallel, processes, changes


def _provable_dispatch(parallel: ParallelConfig) -> tuple[ParallelConfig, list[str]]:
    """`parallel` with tokens that travel as they can between processes without a GPU."""
    changes = []
    if parallel.flex_backend is not None:
        changes.append(
            f"parallel.moe_token_dispatcher_type: flex -> alltoall; {parallel.flex_backend} needs GPUs, and what it "
            "sends is unproven here"
        )
        parallel = replace(parallel, moe_token_dispatcher_type="alltoall", moe_flex_dispatcher_backend=None)
    if parallel.moe_shared_expert_overlap and parallel.expert_model_parallel_size * parallel.etp == 1:
        changes.append("parallel.moe_shared_expert_overlap: True -> False")
        parallel = replace(parallel, moe_shared_expert_overlap=False)
    return parallel, changes


def _halve_largest(parallel: ParallelConfig, model: ModelConfig) -> ParallelConfig | None:
    degrees = (
        "pipeline_model_parallel_size",
        "tensor_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
    )
    candidates = [
        name for name in degrees if (getattr(parallel, name) or 1) > 1 and (getattr(parallel, name) or 1) % 2 == 0
    ]
    if not candidates:
        return None
    largest = max(candidates, key=lambda name: getattr(parallel, name))
    smaller = replace(parallel, **{largest: getattr(parallel, largest) // 2})
    if smaller.tensor_model_parallel_size == 1:
        smaller = replace(smaller, sequence_parallel=False)
    if smaller.pipeline_model_parallel_size == 1:
        smaller = replace(smaller, virtual_pipeline_model_parallel_size=None)
    if model.is_moe and smaller.expert_model_parallel_size == 1:
        smaller = replace(smaller, expert_tensor_parallel_size=None)
    return smaller


def _fewer_layers(model: ModelConfig, parallel: ParallelConfig, most: int) -> int:
    """The layers of `model` divided by so much that at most `most` are left, as far as its pipeline goes with it.

    By a power of two where that is enough: it keeps most patterns of layers as they are. Not fewer than half of `most`,
    which a prime number of layers would become.
    """
    chunks = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    more = parallel.counted_as_layers
    counted = model.num_layers + more
    # A chunk with nothing but what is counted as a layer is not what a run has.
    left = {by: counted // by - more for by in range(1, counted // chunks + 1) if counted % (by * chunks) == 0}
    usable = {by: layers for by, layers in left.items() if layers >= max(chunks, most // 2) or by == 1}
    enough = [by for by, layers in usable.items() if layers <= most]
    by = min(enough, key=lambda by: (by.bit_count() > 1, by)) if enough else max(usable)
    return usable[by]


def _shrink_model(model: ModelConfig, parallel: ParallelConfig, most_layers: int) -> tuple[ModelConfig, list[str]]:
    """The same model with small widths, and with fewer layers where there are very many."""
    tp, etp = parallel.tensor_model_parallel_size, parallel.etp
    changes: list[str] = []
    overrides = model.transformer_overrides
    layers = _fewer_layers(model, parallel, most_layers)
    if layers != model.num_layers:
        changes.append(f"model.num_layers: {model.num_layers} -> {layers}")
        overrides = {k: v for k, v in overrides.items() if k not in _SPLITS_LAYERS}
    pattern: dict[str, Any] = {}
    if model.window_attn_skip_freq is not None and layers != model.num_layers:
        pattern |= {"window_attn_skip_freq": _thin_out(model.window_layer_pattern, layers)}
    if model.is_moe and layers != model.num_layers:
        pattern |= {"moe_layer_freq": _thin_out(model.moe_layer_pattern, layers), "moe_first_k_dense": 0}
        changes.append(f"model.moe_layer_freq: {''.join(map(str, pattern['moe_layer_freq']))} (1 is MoE, 0 is dense)")
    dropped: dict[str, Any] = {name: 0.0 for name in ("attention_dropout", "hidden_dropout") if getattr(model, name)}
    # Other ranks draw other random numbers, so layouts with dropout agree only in distribution.
    changes += [f"model.{name}: {getattr(model, name)} -> 0.0" for name in dropped]
    small = replace(
        model,
        num_layers=layers,
        hidden_size=8 * math.lcm(max(tp, 8), etp),
        kv_channels=None if model.multi_latent_attention else 8,
        multi_latent_attention=_shrink_latent(model.multi_latent_attention),
        # A head has eight dimensions: all are rotated, or half.
        rotary_percent=1.0 if model.rotary_percent > 0.75 else 0.5,
        ffn_hidden_size=24 * tp,
        vocab_size=30 * tp - 1,
        make_vocab_size_divisible_by=2 * tp,
        moe_ffn_hidden_size=12 * etp if model.num_moe_experts else None,
        moe_shared_expert_intermediate_size=16 * tp if model.moe_shared_expert_intermediate_size else None,
        transformer_overrides=overrides,
        **pattern,
        **dropped,
    )
    return small, changes


def _shrink_window(run: RunConfig, lengths: list[int]) -> int | None:
    """A window that leaves out about as little as the run's: nothing, or most of each sequence."""
    window = run.model.sliding_window
    if window is None:
        return None
    return max(lengths) if window >= max(shape.length for shape in run.step_shapes) else min(lengths) // 4 + 1


def _without_dropout(adapters: LoraConfig | None) -> tuple[LoraConfig | None, list[str]]:
    """The run's adapters; other ranks would draw other random numbers."""
    if adapters is None or not any(target.dropout for target in adapters.targets):
        return adapters, []
    targets = [replace(target, dropout=0.0) for target in adapters.targets]
    return replace(adapters, targets=targets), ["adapters.targets: dropout -> 0.0"]


def _shrink_latent(latent: MultiLatentAttention | None) -> MultiLatentAttention | None:
    if latent is None:
        return None
    return MultiLatentAttention(
        kv_lora_rank=24,
        q_lora_rank=40 if latent.q_lora_rank is not None else None,
        qk_head_dim=8,
        qk_pos_emb_head_dim=8,
        v_head_dim=8 if latent.v_head_dim == latent.qk_head_dim else 12,
    )


def _comparable_losses(model: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """`model` without the global balance loss where it cannot be compared with one process.

    That needs the micro-batches of all ranks as one, which is another batch to whatever is defined on a micro-batch.
    """
    losses = model.balance_losses
    if "global_aux_loss" not in losses or ("aux_loss" not in losses and model.moe_expert_capacity_factor is None):
        return model, []
    kept: dict[Any, float] = {kind: weight for kind, weight in losses.items() if kind != "global_aux_loss"}
    changed = replace(
        model,
        moe_router_load_balancing_type=list(kept) or "none",
        moe_aux_loss_coeff=list(kept.values()) or 0.0,
        moe_adaptive_aux_loss=model.moe_adaptive_aux_loss if kept else None,
    )
    return changed, ["model.moe_router_load_balancing_type: without global_aux_loss, which one process sees otherwise"]


def _thin_out(pattern: list[bool], layers: int) -> list[int]:
    """`layers` entries of `pattern`, one of each stretch, that keep alternations, order and both kinds of layer."""
    width = len(pattern) // layers
    stretches = [pattern[n * width : (n + 1) * width] for n in range(layers)]
    thin = [stretch[n % width] for n, stretch in enumerate(stretches)]
    for kind in set(pattern) - set(thin):
        thin[next(n for n, stretch in enumerate(stretches) if kind in stretch)] = kind
    return [int(is_moe) for is_moe in thin]


def _fit_recompute(run: RunConfig, model: ModelConfig, parallel: ParallelConfig) -> RecomputeConfig:
    """The run's recompute, of whatever the torch backend recomputes; the proof is always its.

    All that is kept is small here, and moves to the host's memory where the run says so.
    """
    modules = [module for module in run.recompute.modules if module not in ONLY_WITH_TE]
    chunk = (model.num_layers + parallel.counted_as_layers) // (
        parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    )
    moved = min(run.recompute.offload_layers, chunk)
    if run.recompute.granularity == "selective" and not modules:
        return RecomputeConfig(logits=run.recompute.logits, offload_layers=moved, offload_min_bytes=1)
    layers = min(run.recompute.num_layers, chunk)
    return replace(run.recompute, num_layers=layers, modules=modules, offload_layers=moved, offload_min_bytes=1)


def _unproven(run: RunConfig) -> Iterator[str]:
    """Of each key of `run` that the proof leaves out: what is proven in its place."""
    if run.precision.kind != "fp32":
        yield f"precision.kind: {run.precision.kind}; in fp32, where a fault is larger than rounding"
    if run.runtime.backend != "torch":
        yield f"runtime.backend: {run.runtime.backend}; with the torch backend, which a CPU has"
    if run.runtime.kernels != "torch":
        yield f"runtime.kernels: {run.runtime.kernels}; with the torch steps, which a CPU has"
    if run.runtime.compile_router:
        yield "runtime.compile_router: true; with torch's own steps, for which nothing is compiled"
    for key in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        if getattr(run.optimizer, key) != "fp32":
            yield f"optimizer.{key}: {getattr(run.optimizer, key)}; with moments in fp32"
    if run.optimizer.moments_on_host:
        yield "optimizer.moments_on_host: true; a CPU has one memory"
    if run.recompute.granularity == "selective" and (only := sorted(ONLY_WITH_TE & set(run.recompute.modules))):
        yield f"recompute.modules: {', '.join(only)}; those of the torch backend"
    if run.recompute.offload_layers:
        yield f"recompute.offload_layers: {run.recompute.offload_layers}; by copies of which none runs beside computing"


def _require_legal(cell: Cell) -> None:
    """The shrunk model must obey the same rules; a violation here is a fault of the shrinking."""
    values: dict[str, object] = {
        "adapters": cell.adapters,
        "data.sequence_length": max(shape.length for shape in cell.shapes),
    }
    for section, config in (("model", cell.model), ("parallel", cell.parallel)):
        names = (*config.__dataclass_fields__, *DERIVED[section])
        values[section] = config
        values.update({f"{section}.{name}": getattr(config, name) for name in names})
    broken = violations(values)
    assert not broken, f"the shrunk run is illegal: {broken}"
