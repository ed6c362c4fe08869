"""Where each process stands: the grid of ranks that a parallel configuration spans over a number of processes."""

import math
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


def resolve_layout(parallel: ParallelConfig, train: TrainConfig, world_size: int) -> Layout:
    """Return the layout of `parallel` on `world_size` processes.

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
    faults = []
    if world_size % (tp * cp * pp):
        context = f"context_parallel_size = {cp} x " if cp > 1 else ""
        faults.append(
            f"{world_size} processes cannot be split into tensor_model_parallel_size = {tp} x {context}"
            f"pipeline_model_parallel_size = {pp}; start a multiple of {smallest_world_size(parallel)}"
        )
    elif world_size % (etp * ep * pp):
        faults.append(
            f"{world_size} processes cannot hold experts split over expert_tensor_parallel_size = {etp} x "
            f"expert_model_parallel_size = {ep} x pipeline_model_parallel_size = {pp}; "
            f"start a multiple of {smallest_world_size(parallel)}"
        )
    dp = max(world_size // (tp * cp * pp), 1)
    per_pass = train.micro_batch_size * dp
    if train.global_batch_size % per_pass:
        faults.append(
            f"train.global_batch_size = {train.global_batch_size} is not a multiple of train.micro_batch_size = "
            f"{train.micro_batch_size} x {dp} data-parallel ranks"
        )
    num_microbatches = train.global_batch_size // per_pass
    if parallel.virtual_pipeline_model_parallel_size and num_microbatches % pp:
        faults.append(
            f"the interleaved schedule needs micro-batches ({num_microbatches} = train.global_batch_size / "
            f"micro_batch_size / {dp}) in multiples of pipeline_model_parallel_size = {pp}"
        )
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
        num_microbatches=num_microbatches,
    )
