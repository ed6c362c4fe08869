"""Work in threads and processes: results, faults and interruptions arrive."""

import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
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


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """Processes of a job in the background ignore Ctrl-C, and with them this one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
def test_a_thread_that_hears_of_a_signal_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_LAST_CALL", HANGS)
    left = list[str]()

    def work(interrupted: threading.Event) -> None:
        signal.raise_signal(signal.SIGINT)
        interrupted.wait()
        time.sleep(0.1)
        left.append("done")

    with pytest.raises(KeyboardInterrupt):
        interruptible(work)
    assert left == ["done"]


DEAF = """
import atexit, signal, threading
from megatron_ext.command import ending_on_sigterm, run_command
from megatron_ext.data.prepare.workers import interruptible

atexit.register(print, "Python's own end")

def work(interrupted: threading.Event) -> None:
    signal.raise_signal(signal.{signal})
    threading.Event().wait()

def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with ending_on_sigterm():
        interruptible(work)

run_command(main)
"""


@pytest.mark.parametrize(("name", "said", "code"), [("SIGTERM", "terminated\n", 143), ("SIGINT", "interrupted\n", 130)])
def test_a_command_ends_at_once_where_a_library_is_deaf(name: str, said: str, code: int) -> None:
    """At Python's own end, threads inside C++ would be taken apart, which aborts the process."""
    done = subprocess.run([sys.executable, "-c", DEAF.format(signal=name)], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("", said, code)


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
