"""Which checkpoints a directory holds, and which of them are complete: nothing older is taken for the newest silently.

A run's directory holds `iter_0000100/` for each checkpoint. One is written beside its final name and renamed when
everything is on disk, so that a directory with such a name is complete unless somebody damaged it later.
"""

import functools
import logging
import re
from pathlib import Path

import torch.distributed as dist

from megatron_ext.checkpoint.metadata import METADATA_FILE
from megatron_ext.errors import CheckpointError

log = logging.getLogger(__name__)

TRACKER_FILE = "latest_checkpointed_iteration.txt"
_COMPLETE = re.compile(r"iter_(\d{7,})")


def checkpoint_name(iteration: int) -> str:
    """Directory name of a checkpoint."""
    return f"iter_{iteration:07d}"


def iteration_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says; 0 where it says none."""
    match = _COMPLETE.fullmatch(checkpoint.name)
    return int(match[1]) if match else 0


def find_checkpoint(path: str | Path) -> Path | None:
    """The checkpoint at `path`, or the newest one inside it; None if there never was one.

    Raises:
        CheckpointError: there has been one that is not complete any more. Nothing older is taken in its stead.
    """
    path = Path(path)
    if is_checkpoint(path):
        _require_complete(path, None)
        return path
    found = checkpoints_of(path)
    if found:
        _require_complete(found[-1], next((older for older in reversed(found[:-1]) if not faults_of(older)), None))
    noted = _noted_iteration(path)
    if noted is not None and not found:
        raise CheckpointError(
            f"{path}: {TRACKER_FILE} says {noted}, but no checkpoint is here (a directory iter_* with "
            f"{METADATA_FILE}). Bring it back, or start anew in another directory or after removing {TRACKER_FILE}"
        )
    if found and noted is not None and noted != str(iteration_of(found[-1])) and _speaks():
        _warn_once(f"{path}: {TRACKER_FILE} says {noted}, but the newest checkpoint is {found[-1].name}")
    return found[-1] if found else None


def require_checkpoint(path: str | Path) -> Path:
    """`find_checkpoint`, raising CheckpointError where there is none."""
    require_directory(path)
    found = find_checkpoint(path)
    if found is None:
        raise CheckpointError(f"{path}: no complete Megatron checkpoint (a directory iter_* with {METADATA_FILE}) here")
    return found


def require_directory(path: str | Path) -> None:
    """Raise CheckpointError where there is no directory `path`; a model's name on the hub is taken for one easily."""
    if not Path(path).is_dir():
        raise CheckpointError(f"{path}: no such directory (a model of the Hugging Face hub: `hf download` it first)")


def is_checkpoint(path: Path) -> bool:
    """Whether the directory `path` is, or was meant to be, one checkpoint."""
    return (path / METADATA_FILE).is_file() or (path.is_dir() and any(path.glob("*.distcp")))


def faults_of(checkpoint: Path) -> list[str]:
    """What makes `checkpoint` one that cannot be gone on from; empty where nothing does."""
    faults = []
    if not (checkpoint / METADATA_FILE).is_file():
        faults.append(
            f"{METADATA_FILE} is missing (a hidden file, which `cp DIR/*` leaves behind: copy with `cp -a DIR`)"
        )
    elif not any(checkpoint.glob("*.distcp")):
        faults.append("*.distcp, the tensors, are missing")
    return faults


def complete_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in a directory, oldest first."""
    return [checkpoint for checkpoint in checkpoints_of(directory) if not faults_of(checkpoint)]


def newest_checkpoints(directory: Path, count: int) -> list[Path]:
    """The newest `count` checkpoints in a directory, or as many as there are, oldest first.

    Raises:
        CheckpointError: one of them is damaged. None is passed over for an older one.
    """
    found = checkpoints_of(directory)[-count:]
    for checkpoint in found:
        if faults := faults_of(checkpoint):
            way_out = "bring it back whole, or move it away to do without it"
            raise CheckpointError(f"{checkpoint} is not complete: {'; '.join(faults)}. To go on, {way_out}")
    return found


def checkpoints_of(directory: Path) -> list[Path]:
    """Every directory with the name of a complete checkpoint, oldest first."""
    if not directory.is_dir():
        return []
    return sorted((entry for entry in directory.iterdir() if _COMPLETE.fullmatch(entry.name)), key=iteration_of)


@functools.cache
def _warn_once(text: str) -> None:
    # A run looks for its newest checkpoint several times before its first step.
    log.warning("%s", text)


def _speaks() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _noted_iteration(directory: Path) -> str | None:
    """What the tracker says is the newest checkpoint; None where there is no tracker."""
    try:
        return (directory / TRACKER_FILE).read_text(errors="replace").strip()[:80]
    except (FileNotFoundError, NotADirectoryError):
        return None


def _require_complete(checkpoint: Path, before: Path | None) -> None:
    """Raise CheckpointError where `checkpoint` is damaged, saying how to go on from the one `before` it."""
    if not (faults := faults_of(checkpoint)):
        return
    if before is not None:
        way_out = f"To go on from {before.name} instead, move {checkpoint.name} away"
    else:
        way_out = "There is no complete one before it: bring it back whole, or start anew in another directory"
    raise CheckpointError(f"{checkpoint} is not complete: {'; '.join(faults)}. {way_out}")
