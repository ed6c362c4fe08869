"""Moves tensors from a source to a sink on several threads, with a bounded number of bytes in memory."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from megatron_ext.checkpoint.streams import TensorSink, TensorSource
from megatron_ext.model_io.engine import TensorTask

IN_FLIGHT = 384 * 2**20
"""Bytes of tensors that may be in memory at once; a task that needs more runs alone."""


def transfer(
    tasks: Iterable[TensorTask],
    source: TensorSource,
    sink: TensorSink,
    advance: Callable[[int], None],
    *,
    workers: int = 1,
) -> None:
    """Read, transform and write every task; `advance` is told the bytes written, by one thread at a time.

    The output is the same for any number of `workers`, byte for byte. The first error ends all of them.
    """
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        run = _Run(source, sink, advance)
        try:
            for number, task in enumerate(tasks):
                run.admit(task)
                pool.submit(run.work, number, task)
            run.wait()
        except BaseException as error:
            run.fail(error)
            pool.shutdown(cancel_futures=True)
            raise


class _Run:
    """What the threads of one transfer share."""

    def __init__(self, source: TensorSource, sink: TensorSink, advance: Callable[[int], None]) -> None:
        self._source, self._sink, self._advance = source, sink, advance
        self._changed = threading.Condition()
        self._in_flight = self._admitted = self._done = self._next = 0
        self._failure: BaseException | None = None

    def admit(self, task: TensorTask) -> None:
        """Wait until there is memory for `task`."""
        cost = self._cost(task)
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not self._in_flight or self._in_flight + cost <= IN_FLIGHT)
            self._stop_if_failed()
            self._in_flight += cost
            self._admitted += 1

    def _cost(self, task: TensorTask) -> int:
        """Bytes of what is read, made of it, and converted to another dtype."""
        read = sum(self._source.specs[name].bytes for name in task.reads.values())
        written = sum(self._sink.specs[name].bytes for name in task.writes.values())
        return 2 * read + written

    def work(self, number: int, task: TensorTask) -> None:
        """Do one task; the places of its tensors in the output are given in the order of `number`."""
        try:
            made = task.make({role: self._source.read(name) for role, name in task.reads.items()})
            prepared = [self._sink.prepare(task.writes[role], made.pop(role)) for role in list(made)]
            with self._changed:
                self._changed.wait_for(lambda: self._failure or self._next == number)
                self._stop_if_failed()
                for one in prepared:
                    self._sink.claim(one)
                self._next += 1
                self._changed.notify_all()
            for one in prepared:
                self._sink.store(one)
            with self._changed:
                self._advance(sum(self._sink.specs[name].bytes for name in task.writes.values()))
                self._in_flight -= self._cost(task)
                self._done += 1
                self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End the run with `error`, unless another came first."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when every admitted task is done; raise what ended one."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._done == self._admitted)
            self._stop_if_failed()

    def _stop_if_failed(self) -> None:
        if self._failure is not None:
            raise self._failure
