"""Work in threads and processes: results, faults and interruptions arrive."""

import itertools
import signal
import sys
import threading
import time
from multiprocessing.spawn import get_preparation_data

import pytest

from megatron_ext.command import script_runs_once
from megatron_ext.data.prepare import workers
from megatron_ext.data.prepare.workers import Processes, interruptible
from megatron_ext.errors import DataError, EnvironmentFault
from tests.support.waiting import HANGS


def test_a_thread_gives_its_result_or_its_fault() -> None:
    assert interruptible(lambda interrupted: 7) == 7
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda interrupted: 1 // 0)


def test_a_signal_ends_the_wait_for_a_thread() -> None:
    left = threading.Event()

    def work(interrupted: threading.Event) -> None:
        signal.raise_signal(signal.SIGINT)
        interrupted.wait()
        left.set()

    # Processes of a job in the background ignore Ctrl-C, and with them this one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            interruptible(work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert left.wait(HANGS)


def nothing() -> None:
    pass


def one_over(task: int) -> None:
    if task == 5:
        time.sleep(3600)
    if task == 6:
        raise DataError("six is bad")
    if task == 7:
        raise MemoryError
    1 / task  # noqa: B018 - it is what fails


@pytest.mark.parametrize(
    ("tasks", "kind", "message"),
    [
        ([5, 6], DataError, "six is bad"),
        ([5, 7], EnvironmentFault, "memory ran out"),
        ([1, 0], RuntimeError, r"(?s)failed on task 0:.*ZeroDivisionError"),
    ],
)
def test_a_fault_in_one_process_ends_all(tasks: list[int], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message), Processes(2, nothing) as processes:
        list(processes.run(one_over, tasks, start=nothing, describe="task {}".format))


def test_every_task_is_done_once() -> None:
    with Processes(3, nothing) as processes:
        done = processes.run(one_over, range(20, 30), start=nothing, describe=str)
        assert sorted(done) == list(range(20, 30))
    with Processes(2, nothing) as processes:  # not asked for to the end, they end too
        done = processes.run(one_over, range(20, 30), start=nothing, describe=str)
        assert len(list(itertools.islice(done, 2))) == 2
    assert not any(worker.process.is_alive() for worker in processes._workers)


def test_the_script_of_a_command_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "__main__", sys.modules[__name__])
    assert get_preparation_data("worker")["init_main_from_name"] == __name__
    with script_runs_once():
        assert {"init_main_from_path", "init_main_from_name"}.isdisjoint(get_preparation_data("worker"))
    assert sys.modules["__main__"] is sys.modules[__name__]


def test_a_worker_whose_parent_goes_without_reading_ends_quietly() -> None:
    """A pipe is reset then, not closed."""
    worker = workers._Worker(nothing)
    worker.send((print, nothing))
    worker.give("")
    assert worker.pipe.poll(HANGS)
    worker.pipe.close()
    worker.process.join(HANGS)
    assert worker.process.exitcode == 0
