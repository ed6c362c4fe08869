"""Starts and ends the process group, and splits it into megatron-core's model-parallel groups."""

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.config import ParallelConfig, RuntimeConfig
from megatron_ext.errors import EnvironmentFault

_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Groups:
    """The process groups that training code names explicitly; every rank belongs to one of each kind."""

    tp: dist.ProcessGroup
    cp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    """Ranks that read different samples."""
    dp_cp: dist.ProcessGroup
    """Ranks that have different tokens and the same dense weights: gradients are averaged over them."""
    stage: dist.ProcessGroup
    """The ranks of this pipeline stage: TP x CP x DP."""
    world: dist.ProcessGroup

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pp.rank() == self.pp.size() - 1


def start_process_group(
    runtime: RuntimeConfig,
    device: torch.device,
    *,
    alone: bool = False,
    on_failure: Callable[[], None] = lambda: None,
) -> None:
    """Join the processes that torchrun or Slurm started, or stand alone without a launcher (or if told to).

    Args:
        on_failure: called where the processes cannot meet; may know better why than the backend, and raise it.

    Raises:
        EnvironmentFault: the launcher's variables are there only in part, or the processes cannot meet where they say.
    """
    timeout = datetime.timedelta(minutes=runtime.distributed_timeout_minutes)
    backend = "gloo" if device.type == "cpu" else "nccl"
    present = [name for name in _LAUNCH_VARIABLES if name in os.environ and not alone]
    if not present:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    missing = [name for name in _LAUNCH_VARIABLES if name not in os.environ]
    if missing:
        raise EnvironmentFault(
            f"{', '.join(present)} set, but not {', '.join(missing)}: start with torchrun or launch/slurm.sbatch, "
            "or unset them to run one process"
        )
    device_id = device if device.type == "cuda" else None
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    except RuntimeError as error:
        on_failure()
        if not isinstance(error, dist.DistNetworkError | dist.DistStoreError):
            raise
        rank, address, port = (os.environ[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
        way_out = (
            "rank 0 listens there: another run may have the port; set MASTER_PORT to another one, on every node"
            if rank == "0"
            else "rank 0 is to listen there: does it run, and can this node reach it?"
        )
        raise EnvironmentFault(
            f"MASTER_ADDR = {address}, MASTER_PORT = {port}: rank {rank} cannot join the others: "
            f"{str(error).splitlines()[0]}; {way_out}"
        ) from None


def split_process_group(parallel: ParallelConfig, runtime: RuntimeConfig) -> Groups:
    """Create megatron-core's groups for `parallel` over all processes and return those we use by name."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.etp,
        order="tp-cp-ep-dp-pp",
        distributed_timeout_minutes=runtime.distributed_timeout_minutes,
        create_gloo_process_groups=False,
    )
    world = dist.group.WORLD
    assert world is not None
    return Groups(
        tp=parallel_state.get_tensor_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        stage=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        world=world,
    )


def groups_by_kind() -> dict[str, dist.ProcessGroup]:
    """This rank's group of each kind, by Megatron's abbreviation; groups of one rank are left out."""
    groups = {
        "TP": parallel_state.get_tensor_model_parallel_group(),
        "CP": parallel_state.get_context_parallel_group(),
        "EP": parallel_state.get_expert_model_parallel_group(),
        "DP": parallel_state.get_data_parallel_group(),
        "PP": parallel_state.get_pipeline_model_parallel_group(),
    }
    return {kind: group for kind, group in groups.items() if group.size() > 1}


def end_process_groups() -> None:
    """Leave every group. After a failure the process exits instead: a collective then could wait for ever."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
