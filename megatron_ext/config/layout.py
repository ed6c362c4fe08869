"""Where each process stands: the grid of ranks that a parallel configuration spans over a number of processes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.training import TrainConfig
from megatron_ext.errors import ConfigError


@dataclass(frozen=True)
class Position:
    """One process's rank within each kind of group."""

    rank: int
    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int


@dataclass(frozen=True)
class Layout:
    """Sizes of every kind of group. Megatron's order: TP varies fastest, then context, data, pipeline.

    The expert grid (ETP x EP x EDP) covers the same TP x CP x DP ranks of a pipeline stage as the dense one.
    """

    world_size: int
    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int
    num_microbatches: int

    def position(self, rank: int) -> Position:
        """Where `rank` stands."""
        stage, within = divmod(rank, self.tp * self.cp * self.dp)
        return Position(
            rank=rank,
            tp=within % self.tp,
            cp=within // self.tp % self.cp,
            dp=within // (self.tp * self.cp),
            pp=stage,
            etp=within % self.etp,
            ep=within // self.etp % self.ep,
            edp=within // (self.etp * self.ep),
        )


def smallest_world_size(parallel: ParallelConfig) -> int:
    """Fewest processes that `parallel` can run on."""
    dense = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    stage = math.lcm(dense, parallel.etp * parallel.expert_model_parallel_size)
    return stage * parallel.pipeline_model_parallel_size


@dataclass(frozen=True)
class StepShape:
    """What some steps of a run have in common: those of a stage, of an entry of the batch-size ramp, or all."""

    key: str
    """The key that says the size of their global batch."""
    size: int
    micro_key: str
    """The key that says the size of their micro-batches."""
    micro_size: int
    length: int
    """Tokens a sample."""
    rotary_base: float
    stage: str | None = None
    """Name of the stage."""


def resolve_layout(
    parallel: ParallelConfig, train: TrainConfig, world_size: int, shapes: Sequence[StepShape] = ()
) -> Layout:
    """Return the layout of `parallel` on `world_size` processes.

    Args:
        shapes: of the steps, where those have other batches than `train` says.

    Raises:
        ConfigError: the processes cannot be split this way; every reason at once.
    """
    tp, cp, pp, ep, etp = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.expert_model_parallel_size,
        parallel.etp,
    )
    faults = _split_faults(parallel, world_size)
    dp = max(world_size // (tp * cp * pp), 1)
    usual = StepShape(
        "train.global_batch_size", train.global_batch_size, "train.micro_batch_size", train.micro_batch_size, 0, 0.0
    )
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    found = [_batch_faults(shape, dp, pp, interleaved=interleaved) for shape in (usual, *shapes)]
    faults += dict.fromkeys(fault for batch in found for fault in batch)
    if faults:
        raise ConfigError("\n".join(faults))
    return Layout(
        world_size=world_size,
        tp=tp,
        cp=cp,
        dp=dp,
        pp=pp,
        etp=etp,
        ep=ep,
        edp=world_size // (etp * ep * pp),
        num_microbatches=train.global_batch_size // (train.micro_batch_size * dp),
    )


def _split_faults(parallel: ParallelConfig, world_size: int) -> list[str]:
    tp, cp, pp = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    if world_size % (tp * cp * pp):
        context = f"context_parallel_size = {cp} x " if cp > 1 else ""
        return [
            f"{world_size} processes cannot be split into tensor_model_parallel_size = {tp} x {context}"
            f"pipeline_model_parallel_size = {pp}; start a multiple of {smallest_world_size(parallel)}"
        ]
    ep, etp = parallel.expert_model_parallel_size, parallel.etp
    if world_size % (etp * ep * pp):
        return [
            f"{world_size} processes cannot hold experts split over expert_tensor_parallel_size = {etp} x "
            f"expert_model_parallel_size = {ep} x pipeline_model_parallel_size = {pp}; "
            f"start a multiple of {smallest_world_size(parallel)}"
        ]
    return []


def _batch_faults(shape: StepShape, dp: int, pp: int, *, interleaved: bool) -> list[str]:
    """Why `dp` data-parallel ranks and `pp` stages cannot share a global batch."""
    faults, per_pass = [], shape.micro_size * dp
    # A stage that takes the run's own batch has no fault of its own.
    own = {shape.key, shape.micro_key} != {"train.global_batch_size", "train.micro_batch_size"}
    stage = f" (stage {shape.stage})" if own and shape.stage is not None else ""
    if shape.size % per_pass:
        faults.append(
            f"{shape.key} = {shape.size} is not a multiple of {shape.micro_key} = {shape.micro_size} x {dp} "
            f"data-parallel ranks{stage}"
        )
    num_microbatches = shape.size // per_pass
    if interleaved and num_microbatches % pp:
        faults.append(
            f"the interleaved schedule needs micro-batches ({num_microbatches} = {shape.key} / micro_batch_size / "
            f"{dp}) in multiples of pipeline_model_parallel_size = {pp}{stage}"
        )
    return faults
