"""Processes and threads that work for a command: none outlives it, and the death of one ends it with a message."""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any, Generic, TypeVar

from megatron_ext.errors import EnvironmentFault, MegatronExtError

T = TypeVar("T")
_LAST_WORDS = 5.0
"""Seconds that a process has for ending before it is killed."""
_LAST_CALL = 0.5
"""Seconds that work on a thread has for ending once it is interrupted."""


class Processes:
    """Processes that begin at once, while the command is at something else. Use as a context manager.

    However that ends, all of them have ended then; those of a parent that is killed end by themselves.

    Args:
        load: called in each: what can be done before it is known what to work on. Must be picklable.
    """

    def __init__(self, count: int, load: Callable[[], None]) -> None:
        self._count, self._load = count, load
        self._workers: list[_Worker[Any]] = []

    def __enter__(self) -> "Processes":
        self._workers = [_Worker(self._load) for _ in range(self._count)]
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.end()

    def run(
        self,
        work: Callable[[T], object],
        tasks: Sequence[T],
        *,
        start: Callable[[], None],
        describe: Callable[[T], str],
    ) -> Iterator[T]:
        """Do `work` on every task, shared among all, and yield each task when it is done. To be called once.

        Args:
            start: called once in each process, before the first task. It and `work` must be picklable.
            describe: what a task is about, for messages.

        Raises:
            MegatronExtError: what `work` raised, or a process died.
        """
        queue = iter(tasks)
        for worker in self._workers:
            worker.send((work, start))
            worker.give(next(queue, None))
        while pipes := {worker.pipe: worker for worker in self._workers if worker.task is not None}:
            for pipe in wait(list(pipes)):
                worker = pipes[pipe]  # type: ignore[index]
                yield worker.result(describe)
                worker.give(next(queue, None))


def interruptible(work: Callable[[threading.Event], T]) -> T:
    """Do `work`, deaf to signals while a library is at it, on a thread: Ctrl-C and SIGTERM end the wait at once.

    Args:
        work: given an event that is set then, upon which it should end soon. What it has not done then ends with the
            process.
    """
    interrupted, result = threading.Event(), Future[T]()

    def run() -> None:
        try:
            result.set_result(work(interrupted))
        except BaseException as error:
            result.set_exception(error)

    try:
        threading.Thread(target=run, daemon=True).start()
        # Not join: in Python 3.11 a thread whose join was interrupted counts as ended. And a signal that the system
        # gives to another thread wakes nobody.
        while not result.done():
            futures.wait([result], 0.1)
        return result.result()
    except (KeyboardInterrupt, SystemExit) as error:
        interrupted.set()
        futures.wait([result], _LAST_CALL)
        code = error.code if isinstance(error, SystemExit) else 128 + signal.SIGINT
        atexit.register(_end_with_library, result, code)
        raise


def _end_with_library(work: Future[Any], code: Any) -> None:
    """End the process where a library is still at work: Python's own end takes its thread apart, which aborts C++."""
    if not work.done():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Worker(Generic[T]):
    """One process and the task it is at."""

    def __init__(self, load: Callable[[], None]) -> None:
        # forkserver: worker processes must not inherit threads or locks of the parent.
        context = multiprocessing.get_context("forkserver")
        self.pipe, theirs = context.Pipe()
        self.process: ForkServerProcess = context.Process(target=_serve, args=(theirs, load), daemon=True)
        self.process.start()
        theirs.close()
        self.task: T | None = None

    def give(self, task: T | None) -> None:
        """Send the next task; None: there is none."""
        self.task = task
        self.send(task)

    def send(self, what: object) -> None:
        """Send something; where it died, reading its result says so."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(what)

    def result(self, describe: Callable[[T], str]) -> T:
        """The task, now done; raises what went wrong."""
        assert self.task is not None
        try:
            fault: tuple[type[MegatronExtError] | None, str] | None = self.pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise EnvironmentFault(self._death(describe(self.task))) from error
        if fault is None:
            return self.task
        kind, message = fault
        if kind is None:
            raise RuntimeError(f"worker process {self.process.pid} failed on {describe(self.task)}:\n{message}")
        raise kind(message)

    def _death(self, task: str) -> str:
        self.process.join(_LAST_WORDS)
        code = self.process.exitcode
        how = f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        memory = ", most likely because memory ran out (fewer workers need less)" if code == -signal.SIGKILL else ""
        return f"worker process {self.process.pid} {how}{memory}; it was at {task}"

    def end(self) -> None:
        """End the process, whatever it is at."""
        self.pipe.close()
        self.process.join(_LAST_WORDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(pipe: Connection, load: Callable[[], None]) -> None:
    """What a process does: it is told what to do, and then tasks, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        load()
        work, start = pipe.recv()
        start()
        while (task := pipe.recv()) is not None:
            work(task)
            pipe.send(None)
    except (EOFError, ConnectionError):
        pass  # the parent is gone; reset is the pipe of one that has not read all
    except MegatronExtError as error:
        _tell(pipe, type(error), str(error))
    except MemoryError:
        _tell(pipe, EnvironmentFault, "memory ran out; fewer workers need less")
    except Exception:
        _tell(pipe, None, traceback.format_exc())


def _tell(pipe: Connection, kind: type[MegatronExtError] | None, message: str) -> None:
    """Send what went wrong to the parent, if it is there still."""
    with suppress(ConnectionError):
        pipe.send((kind, message))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
