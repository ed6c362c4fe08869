"""Times peers against each other: each in its own process, taking turns, so that a busy machine slows all alike."""

import dataclasses
import multiprocessing
import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Step = Callable[[], float]
"""Does the work once and returns a number to print (a loss)."""


@dataclass(frozen=True)
class Peer:
    """One competitor. `build(**arguments)` runs in its process and returns the step that is timed."""

    name: str
    build: Callable[..., Step]
    arguments: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    """What the reader of the table must know about it."""


@dataclass
class Timing:
    """What was measured of one peer."""

    seconds: list[float] = field(default_factory=list)
    """Of each step after the warm-up."""
    cpu_seconds: list[float] = field(default_factory=list)
    """What all threads of its process have computed in it, which others' load disturbs least."""
    first: float = float("nan")
    """What the first step returned."""
    peak_bytes: int = 0
    """Most memory that was resident in its process, library code included."""
    failure: str | None = None

    @property
    def median(self) -> float:
        """Median seconds a step."""
        return statistics.median(self.seconds)


class _Process:
    """A peer in its own process, which computes only when asked to."""

    def __init__(self, peer: Peer, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, peer, threads), daemon=True)
        self._process.start()
        child.close()

    def ask(self, request: str) -> Any:
        """The answer to one request; RuntimeError where the process failed or was killed."""
        self._pipe.send(request)
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            killed = " (the system kills processes when memory runs out)" if code == -9 else ""
            raise RuntimeError(f"ended with exit code {code}{killed}") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe: Any, peer: Peer, threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    step: Step | None = None
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            if step is None:
                step = peer.build(**peer.arguments)
            pipe.send(_timed(step) if request == "step" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        except Exception as error:
            print(f"{peer.name}:\n{traceback.format_exc()}", file=sys.stderr)
            pipe.send(f"{type(error).__name__}: {error}"[:200])


def _timed(step: Step) -> tuple[float, float, float]:
    """Seconds, CPU seconds and the value of one step."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    value = step()
    return time.perf_counter() - begin, time.process_time() - cpu_begin, value


def take_turns(peers: Sequence[Peer], *, rounds: int, warmup: int, threads: int) -> dict[str, Timing]:
    """Time every peer: in each round one step of each, in order. A peer that fails is left out of further rounds.

    Args:
        rounds: timed steps of each peer.
        warmup: steps of each peer before, not timed.
        threads: CPU threads of each process; only one computes at a time.
    """
    timings = {peer.name: Timing() for peer in peers}
    running = {peer.name: _Process(peer, threads) for peer in peers}
    try:
        for turn in range(warmup + rounds):
            for name in list(running):
                try:
                    seconds, cpu_seconds, value = running[name].ask("step")
                except RuntimeError as error:
                    timings[name] = dataclasses.replace(timings[name], failure=str(error))
                    running.pop(name).close()
                    continue
                if turn == 0:
                    timings[name].first = value
                if turn >= warmup:
                    timings[name].seconds.append(seconds)
                    timings[name].cpu_seconds.append(cpu_seconds)
                print(f"  step {turn + 1}, {name}: {seconds:.3f} s, {value:.4f}", file=sys.stderr)
        for name, process in running.items():
            timings[name].peak_bytes = process.ask("memory")
    finally:
        for process in running.values():
            process.close()
    return timings
