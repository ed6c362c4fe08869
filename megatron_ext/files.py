"""Files people give us and expect of us: JSON with a clear error; output that is complete, and over nothing else."""

import contextlib
import errno
import fnmatch
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from megatron_ext.errors import MegatronExtError
from megatron_ext.foreign import reading

UNFINISHED = ".partial"
"""Ends the name of output that is still being written."""

OURS = f".megatron_ext{UNFINISHED}"
"""An empty file in each folder that we write or take away: a folder of this name without it is somebody else's."""

_RUST_ERROR = re.compile(r"\(os error (\d+)\)$")
_LARGEST_JSON = 1 << 28
"""Bytes. The largest that people have (tokenizer.json, the index of a thousand shards) take a tenth of it."""


def read_json_object(path: str | Path, error: type[MegatronExtError], *, unique: bool = False) -> dict[str, Any]:
    """The JSON object in the file at `path`; raises `error` where there is none, or, if `unique`, a key comes twice."""
    with reading(path, error, kind="JSON"):
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > _LARGEST_JSON:
                raise ValueError(f"it has {size:,} bytes, more than any such file")
            text = file.readall().decode("utf-8-sig")  # some editors begin a file with a byte order mark
        content = json.loads(text, object_pairs_hook=json_pairs if unique else None)
    if not isinstance(content, dict):
        raise error(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def json_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different: the `object_pairs_hook` that raises ValueError where they are not."""
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"the key {name!r} is written twice")
        content[name] = value
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


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Give an OSError from inside (a full disk, a quota) the name of the file being written, where it has none.

    Libraries in Rust (tokenizers, safetensors) raise a plain Exception then, which ends with the system's number.
    """
    try:
        yield
    except OSError as fault:
        if fault.filename is not None:
            raise
        # numpy knows how many bytes it could not write, but not why.
        why = fault.strerror or f"cannot be written ({fault})"
        raise OSError(fault.errno or errno.ENOSPC, why, str(path)) from fault
    except Exception as fault:
        if (of_system := _RUST_ERROR.search(str(fault))) is None:
            raise
        number = int(of_system[1])
        raise OSError(number, os.strerror(number), str(path)) from fault


def require_writable(path: str | Path) -> None:
    """Find out before the work whether the file at `path` could be written; what is there stays. Makes its folder.

    Raises:
        OSError: naming `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def write_text(path: str | Path, text: str) -> None:
    """Write the file at `path`, making its folder; a reader sees the old content or the new, never a part."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes | memoryview) -> None:
    """Write the file at `path` as `write_text` does."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that no other process has, made anew: never through a link that somebody left there.
    beside = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    beside.unlink(missing_ok=True)
    try:
        with writing(path):
            with open(beside, "xb") as file:
                file.write(content)
            beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


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
    names = [entry.name for entry in place.iterdir() if entry.name != OURS] if place.is_dir() else [place.name]
    foreign = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in contents)]
    if foreign or (names and not fnmatch.filter(names, contents[0])):
        why = f"it holds {foreign[0]}" if foreign else f"it has no {contents[0]}"
        raise error(f"{target} exists and is something else ({why}): not replaced, even with --force")
    return place


def unfinished_place(target: Path) -> Path:
    """The folder in which the output directory `target` is written until it is complete."""
    return target.with_name(target.name + UNFINISHED)


def start_directory(target: Path) -> Path:
    """Make the folder in which `target` is written, empty and marked as ours; what a killed process left there goes.

    Raises:
        OSError: it cannot be made, or something of somebody else stands there.
    """
    partial = unfinished_place(target)
    remove_unfinished(partial)
    partial.mkdir(parents=True)
    (partial / OURS).touch()
    return partial


def remove_unfinished(folder: Path) -> None:
    """Remove a folder that a killed process left, if there is one.

    Raises:
        FileExistsError: what stands there may not be ours.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise FileExistsError(errno.EEXIST, f"{folder.name} is in the way, and not ours; move it away", str(folder))
    if any(folder.iterdir()) and not (folder / OURS).is_file():
        why = f"{folder.name} is in the way. It has no {OURS}, so it may be yours and is not removed; move it away"
        raise FileExistsError(errno.EEXIST, why, str(folder))
    _remove_ours(folder)


def _remove_ours(folder: Path) -> None:
    """Remove a folder of ours, its mark last: interrupted, it is ours still."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != OURS:
            entry.unlink()
    shutil.rmtree(folder)


def publish_directory(partial: Path, target: Path, *, replace: bool = True) -> None:
    """Give a finished directory its name, in place of an older one if `replace` allows it.

    Raises:
        FileExistsError: something has come there meanwhile, or what would be set aside may not be ours.
        OSError: renaming failed; what was there is there still.
    """
    aside = target.with_name(f"{target.name}.old{UNFINISHED}")
    if replace and target.exists():
        aside = _set_aside(target)
        try:
            partial.rename(target)
        except OSError:
            aside.rename(target)
            (target / OURS).unlink()
            raise
    else:
        try:
            partial.rename(target)  # never over anything but an empty folder
        except OSError as fault:
            if not target.exists():
                raise
            why = "somebody else made it meanwhile; not replaced without --force"
            raise FileExistsError(errno.EEXIST, why, str(target)) from fault
    if (aside / OURS).is_file() and not aside.is_symlink():
        _remove_ours(aside)  # also what a process left that was killed between the two renamings
    (target / OURS).unlink(missing_ok=True)


def remove_published(directory: Path) -> None:
    """Remove a finished directory of ours; interrupted, what is left of it looks finished to nobody."""
    _remove_ours(_set_aside(directory))


def _set_aside(directory: Path) -> Path:
    """Rename a directory so that it stops looking finished before its first file is deleted."""
    aside = directory.with_name(f"{directory.name}.old{UNFINISHED}")
    remove_unfinished(aside)
    (directory / OURS).touch()
    return directory.rename(aside)
