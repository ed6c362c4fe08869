"""Random states: seeded from one number so that a run repeats, and saved so that it continues."""

import random
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, torch and megatron-core's tracker, as dropout needs; after the process groups are split.

    Ranks that see other tokens or hold other layers draw other numbers. Those of a TP group draw the same from torch,
    where they compute the same, and others from the tracker.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    place = parallel_state.get_data_parallel_rank(with_context_parallel=True) * stages
    place += parallel_state.get_pipeline_model_parallel_rank()
    # The tracker adds small numbers of its own. Generators on the CPU take 32 bits: an odd distance lasts longest.
    seed_here = seed + 1_000_003 * place
    torch.manual_seed(seed_here)
    model_parallel_cuda_manual_seed(seed_here, force_reset_rng=True)


def random_state(device: torch.device) -> dict[str, Any]:
    """This process's random states, as tensors and plain values that torch.load(weights_only=True) reads."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": list(random.getstate()[1]),
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if device.type == "cuda" else None,
        "tracker": dict(get_cuda_rng_tracker().get_states()),
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `random_state` returned."""
    random.setstate((3, tuple(state["python"]), None))
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
