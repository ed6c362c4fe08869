"""Runs command lines as a user would: forked from a server that has imported everything, or as new processes.

A forked command has its own process, environment, directory, arguments and exit code; what it saves is the seconds in
which Python imports torch. Each tool also starts as a new process somewhere (test_command_lines.py asks each for
--help, launchers and kills start theirs), so that what a first import would break is seen.
"""

import atexit
import contextlib
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_ext.command import run_command
from tests.support import forkserver
from tests.support.waiting import HANGS
from tests.support.workspace import ROOT

TOOLS = ROOT / "tools"
Completed = subprocess.CompletedProcess[str]


def new_process(*arguments: str | Path, timeout: float = HANGS, **environment: str) -> Completed:
    """Run Python with `arguments` from the start and return the process, whatever its exit code."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def command(tool: str | Path, *arguments: str | Path, timeout: float = HANGS, **environment: str) -> Completed:
    """Run a command line of `tools/` and return it, whatever its exit code."""
    with _Files() as files:
        files.start([tool, *arguments], environment)
        return files.finish(timeout)


def in_this_process(
    tool: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: str | Path,
) -> tuple[int, str, str]:
    """Run a command here: exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_command(tool)
    output, errors = capsys.readouterr()
    return int(ended.value.code or 0), output, errors


def train(processes: int, *arguments: str | Path, only_last: Sequence[str] = (), timeout: float = HANGS) -> Completed:
    """Train on several processes, with the variables that torchrun sets and the store that it keeps.

    Args:
        only_last: what the last of several is told besides.
    """
    call = [TOOLS / "train.py", *arguments]
    if processes == 1:
        return command(*call, timeout=timeout)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launcher = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    with _Files() as files:
        for rank in map(str, range(processes)):
            own = only_last if int(rank) == processes - 1 else ()
            files.start([*call, *own], launcher | {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0"})
        return files.finish(timeout)


class _Files:
    """Forked commands that write to the same two files."""

    def __enter__(self) -> "_Files":
        self._stack = contextlib.ExitStack()
        directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="command-")))
        self._outputs = directory / "stdout", directory / "stderr"
        self._processes: list[ForkServerProcess] = []
        self._call: list[str] = []
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._stack.close()

    def start(self, call: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        self._call = list(map(str, call))
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        process = forkserver.context().Process(
            target=_run, args=(self._call, variables, os.getcwd(), self._outputs), daemon=False
        )
        process.start()
        self._processes.append(process)

    def finish(self, timeout: float) -> Completed:
        """Wait for all; the exit code is the first one that is not 0, as a launcher's."""
        for process in self._processes:
            process.join(timeout)
        codes = [process.exitcode for process in self._processes]
        stdout, stderr = (path.read_text() if path.exists() else "" for path in self._outputs)
        if None in codes:
            raise subprocess.TimeoutExpired(self._call, timeout, stdout, stderr)
        code = next((code for code in codes if code), 0)
        return subprocess.CompletedProcess(self._call, code, stdout, stderr)


def _run(call: list[str], environment: Mapping[str, str], directory: str, outputs: Sequence[Path]) -> None:
    """Be the command `call`, from its first line to its exit code."""
    for number, path in zip((1, 2), outputs, strict=True):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv = call
    sys.path[0] = str(Path(call[0]).parent)
    with _exit_code() as code:
        runpy.run_path(call[0], run_name="__main__")
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code[0])


@contextlib.contextmanager
def _exit_code() -> Iterator[list[int]]:
    """What Python would end with, for whatever ends the code inside."""
    code = [0]
    try:
        yield code
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code[0] = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter itself
        traceback.print_exc()
        code[0] = 1
