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
        said = self._errors.read_text(errors="replace").strip()[-_TAIL:]
        return f"exit code {code}: {' '.join(said.split()) or 'it said nothing'} (all of it: {self._errors})"

    def results(self) -> dict[str, float]:
        """The numbers that it printed, by name."""
        return dict(_numbers(self.output))

    def end(self) -> None:
        """End it, with all that it started."""
        self._process.terminate()  # the leash ends the rest
        self._process.wait()


def _numbers(path: Path) -> Iterator[tuple[str, float]]:
    """The numbers of the lines of `path` that are JSON objects of numbers alone."""
    for line in path.read_text(errors="replace").splitlines():
        if not line.lstrip().startswith("{"):
            continue
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in said.values()):
            yield from ((str(name), float(value)) for name, value in said.items())


def _without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what would make the command take itself for a rank of the run."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _OF_LAUNCHERS and not name.startswith(_PREFIXES)
    }
