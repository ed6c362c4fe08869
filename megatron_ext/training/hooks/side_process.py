"""One evaluation of a checkpoint: a process of its own, ended with the run, whose output goes to files."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_ext import leash

_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "NODE_RANK", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
_PREFIXES = ("LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "OMPI_", "MV2_", "PMI", "MEGATRON_EXT_STOP")
_TAIL = 300
"""Characters of a failure's last words."""
_MOST_OUTPUT = 64 << 20
"""Bytes of output that are read: training waits while they are."""
_MOST_NUMBERS = 1000
"""Numbers of a checkpoint; each becomes a plot."""


class EvaluationError(Exception):
    """What a command said cannot be used."""


class SideProcess:
    """Runs `command` for a checkpoint, as its environment says.

    Args:
        folder: its own, also for its output.
        seconds: after which it is ended.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, command: str, checkpoint: Path, step: int, folder: Path, seconds: float) -> None:
        self.checkpoint, self.step, self._limit = checkpoint, step, seconds
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.output, self._errors = folder / "output.txt", folder / "errors.txt"
        environment = _without_launcher(os.environ)
        environment |= {"CHECKPOINT": os.path.abspath(checkpoint), "STEP": str(step)}
        environment["EVALUATION_DIRECTORY"] = os.path.abspath(folder)
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
        self._began = time.monotonic()
        self._took: float | None = None
        self._is_late = False
        with open(self.output, "wb") as output, open(self._errors, "wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-IS", leash.__file__, str(os.getpid()), command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the run
            )

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return self._took if self._took is not None else time.monotonic() - self._began

    def outcome(self) -> str | None:
        """None while it runs; then what went wrong, empty where nothing did."""
        code = self._process.poll()
        if code is None:
            if not self._is_late and self.seconds > self._limit:
                self._is_late = True
                self._process.terminate()  # which takes a while, in which training goes on
            return None
        self._took = self.seconds
        if self._is_late:
            return f"it took longer than evaluation.timeout_minutes, {self._limit / 60:g}"
        if code == 0:
            return ""
        try:
            said = _end_of(self._errors)
        except OSError as error:  # it has removed its own folder
            return f"exit code {code}; what it said cannot be read: {error}"
        return f"exit code {code}: {said or 'it said nothing'} (all of it: {self._errors})"

    def results(self) -> dict[str, float]:
        """The numbers that it printed, by name.

        Raises:
            EvaluationError: there are none, too many, or its output cannot be read.
        """
        try:
            if (size := self.output.stat().st_size) > _MOST_OUTPUT:
                raise EvaluationError(
                    f"it printed {size:,} bytes, and {_MOST_OUTPUT:,} are the most that are read for numbers; let it "
                    "write elsewhere what are none"
                )
            found = dict(_numbers(self.output))
        except OSError as error:
            raise EvaluationError(f"its output cannot be read: {error}") from error
        if len(found) > _MOST_NUMBERS:
            raise EvaluationError(
                f"it printed {len(found):,} numbers, see {self.output}; {_MOST_NUMBERS:,} are the most"
            )
        if not found:
            raise EvaluationError(f'it printed no line such as {{"name": 1.5}}, see {self.output}')
        return found

    def end(self) -> None:
        """End it, with all that it started."""
        self._process.terminate()  # the leash ends the rest
        self._process.wait()


def _end_of(path: Path) -> str:
    """The last words in the file at `path`, on one line."""
    with open(path, "rb") as file:
        file.seek(-min(file.seek(0, os.SEEK_END), 4 * _TAIL), os.SEEK_END)
        said = file.read().decode(errors="replace").strip()[-_TAIL:]
    return " ".join(said.split())


def _numbers(path: Path) -> Iterator[tuple[str, float]]:
    """The numbers of the lines of `path` that are JSON objects of numbers alone."""
    with open(path, errors="replace") as lines:
        for line in lines:
            if not line.lstrip().startswith("{"):
                continue
            try:
                said = json.loads(line)
                if any(isinstance(value, bool) or not isinstance(value, int | float) for value in said.values()):
                    continue
                numbers = [float(value) for value in said.values()]
            except (ValueError, OverflowError, RecursionError):
                continue
            # Half a character, which JSON can spell and no file can hold, becomes a question mark.
            names = [name.encode(errors="replace").decode() for name in said]
            yield from zip(names, numbers, strict=True)


def _without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what would make the command take itself for a rank of the run."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _OF_LAUNCHERS and not name.startswith(_PREFIXES)
    }
