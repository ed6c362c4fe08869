"""A pool of Gloo processes that stay alive between tests: importing megatron-core costs, starting a group does not."""

import contextlib
import datetime
import faulthandler
import gc
import importlib
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class WorkerFailure(AssertionError):
    """A function failed on a rank; the message has that rank's traceback."""


class GlooPool:
    """Runs functions on any number of processes up to `size`, each call in a fresh process group.

    Functions must be importable (defined at the top of a module); arguments and results are pickled. Workers are
    forked from a server that has imported this framework once, so that they share its memory.

    Args:
        transformer_engine: start each worker on its own, with Transformer Engine imported before this framework, which
            otherwise hides it where there is no GPU.
    """

    def __init__(self, size: int, *, transformer_engine: bool = False) -> None:
        self.size = size
        self._transformer_engine = transformer_engine
        self._context: Any = multiprocessing.get_context("spawn" if transformer_engine else "forkserver")
        if not transformer_engine:
            self._context.set_forkserver_preload(["megatron_ext.testing.preload"])
        self._workers: list[tuple[Any, Connection]] = []
        self._stacks = tempfile.TemporaryDirectory(prefix="stacks-")

    def run(self, world_size: int, function: Callable[..., T], *args: Any, timeout: float = 600.0) -> list[T]:
        """Call `function(*args)` on ranks 0 to `world_size` - 1 and return their results in order of rank.

        Raises:
            WorkerFailure: a rank raised or died, or `timeout` seconds passed; the message then says where each of the
                ranks that did not answer stands. The workers are replaced.
        """
        assert world_size <= self.size, f"the pool has {self.size} processes"
        self._start(world_size)
        with tempfile.TemporaryDirectory(prefix="gloo-") as directory:
            store = str(Path(directory) / "store")
            for rank in range(world_size):
                self._workers[rank][1].send((function, args, rank, world_size, store))
            try:
                return self._collect(world_size, timeout)
            except WorkerFailure:
                self.close()
                raise

    def _start(self, count: int) -> None:
        while len(self._workers) < count:
            ours, theirs = self._context.Pipe()
            stacks = Path(self._stacks.name) / f"{len(self._workers)}"
            process = self._context.Process(target=_work, args=(theirs, stacks, self._transformer_engine), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self, world_size: int, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        rank_of: dict[Any, int] = {self._workers[rank][1]: rank for rank in range(world_size)}
        while len(results) < world_size:
            waiting = [connection for connection, rank in rank_of.items() if rank not in results]
            ready = wait(waiting, timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                ranks = [rank_of[connection] for connection in waiting]
                stacks = "\n".join(f"rank {rank}:\n{self._stack(rank)}" for rank in ranks)
                raise WorkerFailure(f"no answer within {timeout:.0f} s from ranks {ranks}\n{stacks}")
            for connection in ready:
                rank = rank_of[connection]
                try:
                    succeeded, results[rank] = self._workers[rank][1].recv()
                except EOFError:
                    raise WorkerFailure(f"rank {rank} died") from None
                if not succeeded:
                    raise WorkerFailure(f"rank {rank}:\n{results[rank]}")
        return [results[rank] for rank in range(world_size)]

    def _stack(self, rank: int) -> str:
        """What the threads of a rank are doing now; empty where it cannot say so within a second."""
        process, _ = self._workers[rank]
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(process.pid, signal.SIGUSR1)
            time.sleep(1)
        return (Path(self._stacks.name) / f"{rank}").read_text(errors="replace")

    def close(self) -> None:
        """End all workers."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers.clear()

    def __enter__(self) -> "GlooPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _work(connection: Connection, stacks: Path, transformer_engine: bool) -> None:
    """Serve calls until the pool closes the connection; write the stacks of all threads to `stacks` on SIGUSR1."""
    faulthandler.register(signal.SIGUSR1, file=stacks.open("w"))
    if transformer_engine:
        import torch  # noqa: F401 - brings the libraries that Transformer Engine links to

        importlib.import_module("transformer_engine.pytorch")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with contextlib.suppress(EOFError):
        while True:
            function, args, rank, world_size, store = connection.recv()
            try:
                answer = (True, _call(function, args, rank, world_size, store))
            except BaseException:  # noqa: BLE001 - the traceback travels to the caller
                answer = (False, traceback.format_exc())
            connection.send(answer)


def _call(function: Callable[..., T], args: tuple[Any, ...], rank: int, world_size: int, store: str) -> T:
    import torch
    import torch.distributed as dist

    from megatron_ext.config import RuntimeConfig
    from megatron_ext.runtime.device import choose_device
    from megatron_ext.runtime.process_groups import end_process_groups

    choose_device(RuntimeConfig(device="cpu", threads=1))
    torch.manual_seed(0)
    timeout = datetime.timedelta(seconds=300)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size, timeout=timeout
    )
    try:
        answer = function(*args)
        if dist.is_initialized():
            # Nobody leaves before all have come: with nothing to do together, a rank could end its groups while another
            # was still connecting to it.
            dist.barrier()
        return answer
    finally:
        end_process_groups()
        # A group's threads and sockets end with its last reference, and models hold theirs in cycles: hundreds of
        # calls would leave thousands of threads to a worker, and a machine has 32,768 by default.
        gc.collect()
