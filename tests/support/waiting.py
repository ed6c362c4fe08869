"""What tests wait for: a condition or the end of a process, never a time; and processes that wait for a test."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

HANGS = 600.0
"""Seconds after which what a test waits for never comes: many times what a slow machine at other work needs."""
_CUSTOM = Path(__file__).with_name("holding")


def wait_until(
    condition: Callable[[], Any],
    said: Callable[[], object] = lambda: "",
    process: subprocess.Popen[Any] | None = None,
) -> None:
    """Wait for `condition`, which comes soon unless something is broken.

    Args:
        said: shown where it does not come: what those say who should have brought it.
        process: without which it cannot come.
    """
    deadline = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain\n{said()}"
        # What it did last may have been what is waited for.
        assert process is None or process.poll() is None or condition(), f"ended with {process.poll()}\n{said()}"
        time.sleep(0.01)


def wait_for_ends(processes: Sequence[psutil.Process | int]) -> None:
    """Wait until all have ended, whoever has asked for their exit codes: a container's init may not."""
    wait_until(lambda: all(map(_has_ended, processes)), lambda: f"these go on: {processes}")


def _has_ended(process: psutil.Process | int) -> bool:
    try:
        if isinstance(process, int):
            process = psutil.Process(process)
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def ranks_of(launcher: subprocess.Popen[Any]) -> dict[int, psutil.Process]:
    """The ranks that a launcher has started and that live, by number."""
    ranks = {}
    for child in psutil.Process(launcher.pid).children():
        try:
            ranks[int(child.environ()["RANK"])] = child
        except (psutil.Error, KeyError):  # it has ended, or is not there yet
            continue
    return ranks


@contextmanager
def ended_at_last(process: subprocess.Popen[Any]) -> Iterator[None]:
    """While open, `process` may do as it likes; whatever comes of the test, it has ended afterwards."""
    try:
        yield
    finally:
        process.kill()
        process.wait()


class Holds:
    """Processes with `environment`, and those that they start, wait before they open or make what has such a name.

    Or what lies in a folder that has. So they are still at their work when a test interrupts them, however fast they
    are and however late the test is.

    Args:
        folder: for notes of the names; made here. Without it nothing waits any more.
    """

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        inherited = os.environ.get("PYTHONPATH")
        self.environment = {
            "PYTHONPATH": os.pathsep.join([str(_CUSTOM), *([inherited] if inherited else [])]),
            "MEGATRON_EXT_TEST_HOLDS": str(folder),
        }

    def release(self, name: str) -> None:
        """Let them go on with the file `name`."""
        (self.folder / name).unlink()
