"""Files people give us and expect of us: JSON with a clear error; output that is complete, and over nothing else."""

import errno
import fnmatch
import json
import os
import shutil
import stat
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from megatron_ext.errors import MegatronExtError
from megatron_ext.foreign import reading

UNFINISHED = ".partial"
"""Ends the name of output that is still being written."""


def read_json_object(path: str | Path, error: type[MegatronExtError]) -> dict[str, Any]:
    """The JSON object in the file at `path`; raises `error` where there is none."""
    with reading(path, error, kind="JSON"):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise error(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def open_regular(path: str | Path, *, follow_links: bool = True) -> FileIO:
    """Open the file at `path` to read its bytes, unbuffered.

    Raises:
        OSError: there is none, or it is something that never ends or never answers (a pipe, a device), or, unless
            `follow_links`, a link.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)  # not blocking, or the opening of a pipe would wait for a writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return FileIO(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write the file at `path`, making its folder; a reader sees the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + UNFINISHED)
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def output_place(
    target: str | Path,
    error: type[MegatronExtError],
    *,
    force: bool,
    contents: Sequence[str],
    inputs: Sequence[Path] = (),
) -> Path:
    """Where the output directory `target` is to be written, links followed; raises `error` if it may not be.

    What exists is replaced only with `force`, only if it is the same kind of thing, and never if it holds an input.

    Args:
        contents: name patterns of all that a directory of this kind holds; the first is never missing.
        inputs: what the output is made of.
    """
    place = Path(target).resolve() if Path(target).is_symlink() else Path(target)
    for source in inputs:
        if source.resolve().is_relative_to(place.resolve()):
            raise error(f"{target} holds what is read ({source}); choose another place")
    if not place.exists():
        return place
    if not force:
        raise error(f"{target} exists; choose another place or pass --force to replace it")
    names = [entry.name for entry in place.iterdir()] if place.is_dir() else [place.name]
    foreign = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in contents)]
    if foreign or (names and not fnmatch.filter(names, contents[0])):
        why = f"it holds {foreign[0]}" if foreign else f"it has no {contents[0]}"
        raise error(f"{target} exists and is something else ({why}): not replaced, even with --force")
    return place


def publish_directory(partial: Path, target: Path) -> None:
    """Give a finished directory its name, in place of an older one."""
    if target.exists():
        aside = target.with_name(f"{target.name}.old{UNFINISHED}")
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
        partial.rename(target)
        shutil.rmtree(aside)
    else:
        partial.rename(target)
