"""Which device this process computes on, and with how many threads."""

import os

import torch

from megatron_ext.config import RuntimeConfig
from megatron_ext.errors import EnvironmentFault
from megatron_ext.runtime import cpu_compat
from megatron_ext.runtime.deterministic import compute_deterministically


def choose_device(runtime: RuntimeConfig) -> torch.device:
    """Return this process's device, made current; on CPU megatron-core is prepared for it.

    Raises:
        EnvironmentFault: CUDA was asked for and is not there, there are more local processes than GPUs, or the
            environment does not allow runtime.deterministic.
    """
    device = _device(runtime)
    if runtime.deterministic:
        compute_deterministically(device)
    return device


def _device(runtime: RuntimeConfig) -> torch.device:
    """`choose_device`, without the order of sums.

    Raises:
        EnvironmentFault: CUDA was asked for and is not there, or there are more local processes than GPUs.
    """
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault(
            "runtime.device = 'cuda': torch finds no CUDA device "
            f"(torch {torch.__version__}); set runtime.device: cpu, or check the driver with nvidia-smi"
        )
    if runtime.device == "cpu" or not torch.cuda.is_available():
        torch.set_num_threads(_cpu_threads(runtime))
        cpu_compat.install()
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise EnvironmentFault(
            f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}; "
            "start one process a GPU (torchrun --nproc-per-node, CUDA_VISIBLE_DEVICES)"
        )
    torch.cuda.set_device(local_rank)
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    return torch.device("cuda", local_rank)


def _cpu_threads(runtime: RuntimeConfig) -> int:
    if runtime.threads:
        return runtime.threads
    if "OMP_NUM_THREADS" in os.environ:
        return max(int(os.environ["OMP_NUM_THREADS"]), 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
