"""The pool of processes: what one call leaves behind does not weigh on the next."""

import gc
import os

import torch

from megatron_ext.config import ParallelConfig
from megatron_ext.proving.parity import Cell, run_layout
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model


def left_behind() -> tuple[int, int]:
    """Modules and threads that are alive in this process, which has looked for garbage after its last call."""
    modules = sum(issubclass(type(thing), torch.nn.Module) for thing in gc.get_objects())
    return modules, len(os.listdir("/proc/self/task"))


def test_trained_models_and_their_groups_are_gone() -> None:
    cell = Cell(tiny_model(moe=True), ParallelConfig(), steps=1)
    with GlooPool(2) as pool:
        run_layout(pool, cell, 2)
        modules_before, threads_before = pool.run(2, left_behind)[0]
        for _ in range(3):
            run_layout(pool, cell, 2)
        modules, threads = pool.run(2, left_behind)[0]
    # megatron-core caches a rotary embedding, which holds one group (3 threads), for each model it has met; a training
    # that was not released is 80 modules and 48 threads.
    print(f"modules {modules_before} -> {modules}, threads {threads_before} -> {threads}")
    assert modules - modules_before <= 3
    assert threads - threads_before <= 3 * 3
