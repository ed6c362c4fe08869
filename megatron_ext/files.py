"""Files people give us and expect of us: JSON with a clear error; output that is complete, and over nothing else."""

import errno
import fnmatch
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.errors import MegatronExtError

UNFINISHED = ".partial"
"""Ends the name of output that is still being written."""


def read_json_object(path: str | Path, error: type[MegatronExtError]) -> dict[str, Any]:
    """The JSON object in the file at `path`; raises `error` where there is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise error(f"{path}: cannot be read as JSON ({fault})") from fault
    if not isinstance(content, dict):
        raise error(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


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


def publish_directory(partial: Path, target: Path, *, replace: bool = True) -> None:
    """Give a finished directory its name, in place of an older one if `replace` allows it.

    Raises:
        FileExistsError: something has come there meanwhile.
    """
    if target.exists():
        if not replace:
            raise FileExistsError(
                errno.EEXIST, "somebody else made it meanwhile; not replaced without --force", str(target)
            )
        aside = target.with_name(f"{target.name}.old{UNFINISHED}")
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
        partial.rename(target)
        shutil.rmtree(aside)
    else:
        partial.rename(target)
