#!/usr/bin/env python
"""Saving: how long training stands still, how fast it is written and what memory it takes, beside megatron-core's own.

python benchmarks/checkpoint.py save --record                          # both save the same tensors, taking turns
python benchmarks/checkpoint.py plan RUN.yaml --world-size 288         # what a checkpoint of a real run would be
"""

import argparse
import contextlib
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from checkpoint_plan import plan_text
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from report import hardware, markdown_table, record, versions

from megatron_ext.checkpoint.find import require_checkpoint
from megatron_ext.checkpoint.load import load_shards
from megatron_ext.checkpoint.manager import CheckpointManager
from megatron_ext.checkpoint.retention import Retention
from megatron_ext.checkpoint.shards import TensorShard
from megatron_ext.checkpoint.state_file import UNTRAINED
from megatron_ext.checkpoint.torch_dist import TorchDistReader
from megatron_ext.command import positive_integer
from megatron_ext.config import RuntimeConfig, load_run
from megatron_ext.runtime.device import choose_device
from megatron_ext.testing.pool import GlooPool

SIDE = 1024
"""Rows and columns of a tensor, which has 4 MB."""
CORE, CORE_ASYNCHRONOUS = "megatron-core, synchronous", "megatron-core, asynchronous"
OURS_SYNCHRONOUS, OURS = "ours, synchronous", "ours, asynchronous"


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    save = commands.add_parser("save", help="measure")
    save.add_argument("--ranks", type=positive_integer, default=2, help="processes (default 2)")
    save.add_argument("--megabytes", type=positive_integer, default=400, help="of each rank (default 400)")
    save.add_argument("--rounds", type=positive_integer, default=5, help="saves of each way (default 5)")
    save.add_argument("--directory", metavar="DIR", help="where to write (default: a temporary folder)")
    plan = commands.add_parser("plan", help="compute")
    plan.add_argument("run", help="YAML of the run")
    plan.add_argument("--world-size", type=positive_integer, required=True, metavar="N", help="processes")
    plan.add_argument("--copy-rate", type=float, default=20.0, help="GB/s from a device to its host (default 20)")
    plan.add_argument("--disk-rate", type=float, default=40.0, help="GB/s of the file system, all ranks (default 40)")
    for command in (save, plan):
        command.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    options = parser.parse_args()
    if options.command == "plan":
        title = "Checkpoints of a run, computed"
        text = plan_text(load_run(options.run, []), options.world_size, options.copy_rate, options.disk_rate)
    else:
        title, text = "Saving, beside megatron-core", measure(options)
    print(text)
    if options.record:
        record(title, text)


def measure(options: argparse.Namespace) -> str:
    """Save by each way in turn and return the table."""
    ranks, megabytes, rounds = options.ranks, options.megabytes, options.rounds
    with tempfile.TemporaryDirectory(dir=options.directory) as folder, GlooPool(ranks) as pool:
        answers = pool.run(ranks, save_by_turns, Path(folder), megabytes, rounds, timeout=3000)
        extra = max(pool.run(ranks, load_cut_otherwise, Path(folder) / OURS, ranks, timeout=3000))
    # What is slowest on any rank is what a run waits for.
    worst = {way: [max(one[way][n] for one in answers) for n in range(3)] for way in answers[0]}
    first_stall, first_total, _ = worst[CORE]
    rows = [
        [
            way,
            f"{stall:.3f}",
            f"{stall / first_stall:.2f}",
            f"{total:.3f}",
            f"{total / first_total:.2f}",
            f"{ranks * megabytes / total:,.0f}",
            f"{memory:+.0f}",
        ]
        for way, (stall, total, memory) in worst.items()
    ]
    columns = ["way", "stall, s", "to core's", "complete after, s", "to core's", "MB/s", "memory of a rank, MB"]
    said = f"{ranks} ranks of {megabytes} MB in tensors of 4 MB; the quickest of {rounds} saves, taking turns."
    loaded = (
        f"Loaded with each tensor cut otherwise, a rank took {extra:.0f} MB beside the {megabytes} MB that it loads."
    )
    return f"{hardware()}. {versions('torch', 'megatron-core')}. {said}\n\n{markdown_table(columns, rows)}\n\n{loaded}"


def save_by_turns(folder: Path, megabytes: int, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Of each way: seconds of stall, seconds until complete, MB of memory more than before."""
    choose_device(RuntimeConfig(device="cpu", threads=1))
    # megatron-core's writer starts processes, which a daemon (every worker of the pool) may not do.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    tensors = {f"{dist.get_rank()}.{n}": torch.randn(SIDE, SIDE) for n in range(megabytes * 10**6 // (4 * SIDE**2))}
    save_rounds(folder / "warming up", dict([next(iter(tensors.items()))]), 1)
    measured = save_rounds(folder, tensors, rounds)
    filesystem_async._results_queue._manager.shutdown()
    filesystem_async._results_queue = None
    return measured


def save_rounds(folder: Path, tensors: dict[str, torch.Tensor], rounds: int) -> dict[str, tuple[float, float, float]]:
    """Save these tensors by all ways in turn, once more than `rounds`."""
    folder.mkdir(exist_ok=True)
    managers = {way: manager(folder / way, tensors, asynchronous=way == OURS) for way in (OURS, OURS_SYNCHRONOUS)}
    ways: dict[str, Callable[[int], tuple[float, float]]] = {
        CORE: lambda n: with_core(tensors, folder / f"core {n}", asynchronous=False),
        CORE_ASYNCHRONOUS: lambda n: with_core(tensors, folder / f"core {n}", asynchronous=True),
        OURS_SYNCHRONOUS: lambda n: with_ours(managers[OURS_SYNCHRONOUS], n, waits=True),
        OURS: lambda n: with_ours(managers[OURS], n, waits=False),
    }
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    memory = dict.fromkeys(ways, 0.0)
    for number in range(1, rounds + 2):
        for way, save in ways.items():
            dist.barrier()
            with watched_memory() as used:
                times = save(number)
            dist.barrier()
            memory[way] = max(memory[way], used[0])
            if dist.get_rank() == 0 and (target := folder / f"core {number}").is_dir():
                shutil.rmtree(target)
            if number > 1:  # the first one makes memory, which later ones have
                taken[way].append(times)
    least = {way: [min(one) for one in zip(*times, strict=True)] for way, times in taken.items()}
    return {way: (stall, total, memory[way]) for way, (stall, total) in least.items()}


def manager(directory: Path, tensors: dict[str, torch.Tensor], *, asynchronous: bool) -> CheckpointManager:
    """The manager of a run that has these tensors."""
    made = CheckpointManager(directory, {}, retention=Retention(keep_last=2), asynchronous=asynchronous)
    shards = [TensorShard(key, (SIDE, SIDE), (0, 0), tensor, is_writer=True) for key, tensor in tensors.items()]
    made.register("tensors", tensors=lambda: shards)
    made.register("progress", scalars=lambda: UNTRAINED)
    return made


def with_ours(saves: CheckpointManager, number: int, *, waits: bool) -> tuple[float, float]:
    """Seconds of stall, and until the checkpoint is complete."""
    begun = time.perf_counter()
    saves.stage(number)
    stalled = time.perf_counter() - begun
    saves.finish()
    total = time.perf_counter() - begun
    return (total if waits else stalled), total


def with_core(tensors: dict[str, torch.Tensor], target: Path, *, asynchronous: bool) -> tuple[float, float]:
    """The same of megatron-core."""
    if dist.get_rank() == 0:
        target.mkdir()
    dist.barrier()
    begun = time.perf_counter()
    state = {key: ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in tensors.items()}
    request = dist_checkpointing.save(state, str(target), async_sharded_save=asynchronous)
    if request is None:
        total = time.perf_counter() - begun
        return total, total
    queue = AsyncCallsQueue(persistent=False)
    queue.schedule_async_request(request)
    stalled = time.perf_counter() - begun
    queue.maybe_finalize_async_calls(blocking=True)
    return stalled, time.perf_counter() - begun


def load_cut_otherwise(directory: Path, ranks: int) -> float:
    """Load this rank's columns of all tensors; MB of memory beyond what they take."""
    checkpoint = require_checkpoint(directory)
    keys = sorted(TorchDistReader(checkpoint).tensors)
    width = SIDE // ranks
    targets = [torch.zeros(SIDE, width) for _ in keys]
    pairs = zip(keys, targets, strict=True)
    shards = [TensorShard(key, (SIDE, SIDE), (0, dist.get_rank() * width), data, is_writer=True) for key, data in pairs]
    dist.barrier()
    with watched_memory() as used:
        load_shards(checkpoint, shards)
    return used[0]


@contextmanager
def watched_memory() -> Iterator[list[float]]:
    """MB that this process and those it starts take at most more than before, when it is over."""
    used, end, me = [0.0], threading.Event(), psutil.Process()

    def taken() -> int:
        private = 0
        for child in me.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                private += child.memory_full_info().uss
        return int(me.memory_info().rss + private)

    before = taken()

    def look() -> None:
        while not end.wait(0.02):
            used[0] = max(used[0], (taken() - before) / 1e6)

    thread = threading.Thread(target=look)
    thread.start()
    yield used
    end.set()
    thread.join()


if __name__ == "__main__":
    main()
