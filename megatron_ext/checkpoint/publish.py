"""A checkpoint's directory: the small files beside its tensors, its name once it is complete, and its end.

`<directory>/iter_0000100/` holds the tensors in `torch_dist` format, `run.yaml` (the resolved configuration),
`state.json` (scalars: step, data position, ...), `rng.pt` (random states), `tokenizer/` and `manifest.json` (size and
checksum of each). It is written beside its final name, the manifest last, and renamed when everything is on disk, so a
directory with such a name is complete.

Stock megatron-core loads it with `StrictHandling.LOG_ALL` (Megatron-LM: `--dist-ckpt-strictness log_all`): its layers
also ask for an `_extra_state`, Transformer Engine's fp8 bookkeeping, which is no part of the model and not stored here.
"""

import fnmatch
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.find import TRACKER_FILE
from megatron_ext.checkpoint.metadata import METADATA_FILE
from megatron_ext.checkpoint.run_file import RUN_FILE, write_run
from megatron_ext.checkpoint.state_file import RNG_FILE, STATE_FILE, write_saved, write_scalars
from megatron_ext.checkpoint.tokenizer_files import TOKENIZER_FOLDER, copy_tokenizer
from megatron_ext.files import UNFINISHED, publish_directory, write_text
from megatron_ext.manifest import MANIFEST_FILE

log = logging.getLogger(__name__)

CHECKPOINT_CONTENTS = (
    METADATA_FILE,
    "*.distcp",
    "common.pt",
    "metadata.json",
    RUN_FILE,
    STATE_FILE,
    RNG_FILE,
    TOKENIZER_FOLDER,
    MANIFEST_FILE,
)
"""What stands in a complete checkpoint."""


def write_small_files(
    partial: Path, iteration: int, scalars: Mapping[str, Any], run: dict[str, Any], tokenizer: Path | None
) -> None:
    """Write what stands beside the tensors, including the two files megatron-core itself asks for."""
    if tokenizer is not None and tokenizer.is_dir():
        (partial / TOKENIZER_FOLDER).mkdir()
        copy_tokenizer(tokenizer, partial / TOKENIZER_FOLDER)
    write_run(partial, run)
    write_scalars(partial, scalars)
    write_saved(partial / "common.pt", {"iteration": iteration, "checkpoint_version": 3.0})
    backends = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    write_text(partial / "metadata.json", json.dumps(backends) + "\n")


def publish(partial: Path, final: Path, iteration: int, *, sync: bool = True, replace: bool = True) -> None:
    """Give a finished checkpoint its name, with `sync` only once everything is on disk, and note it as the newest.

    Raises:
        OSError: it could not be written or renamed; a FileExistsError where, without `replace`, one stands there.
    """
    for path in (*partial.rglob("*"), partial) if sync else ():
        _sync(path)
    publish_directory(partial, final, replace=replace)
    tracker = final.parent / TRACKER_FILE
    beside = tracker.with_name(tracker.name + UNFINISHED)
    beside.write_text(f"{iteration}\n")
    beside.rename(tracker)
    _sync(final.parent)


def remove_leftovers(directory: Path) -> None:
    """Remove what saves of a run that did not finish have left in its directory."""
    for leftover in unfinished_saves(directory):
        if _is_leftover(leftover):
            log.warning("removing %s, left by a save that did not finish", leftover)
            shutil.rmtree(leftover)


def in_the_way(directory: Path) -> list[Path]:
    """What stands in a run's directory where a save may have to write, but was not left by one."""
    return [path for path in unfinished_saves(directory) if not _is_leftover(path)]


def unfinished_saves(directory: Path) -> list[Path]:
    """What ended saves have left in a run's directory, by step."""
    return sorted(directory.glob(f"iter_*{UNFINISHED}")) if directory.is_dir() else []


def _is_leftover(path: Path) -> bool:
    """Whether all that is at `path` is what a save writes."""
    known = (*CHECKPOINT_CONTENTS, f"*{UNFINISHED}")
    return (
        path.is_dir()
        and not path.is_symlink()
        and all(any(fnmatch.fnmatch(entry.name, pattern) for pattern in known) for entry in path.iterdir())
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
