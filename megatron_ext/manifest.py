"""The manifest of a finished directory: every file with its size and checksum, so that damage is found, not used.

Checkpoints, exports and prepared data each carry a `manifest.json`. It is written last, at the unfinished place, before
the directory gets its name:

    write_manifest(partial)                                # reads every file once, on two threads
    write_manifest(partial, {"train.bin": running.sum()})  # what was summed while it was written is not read again
    publish_directory(partial, target, replace=force)

and is looked at whenever the directory is read:

    check_manifest(directory, DataError)                   # sizes: costs nothing
    check_manifest(directory, DataError, checksums=True)   # reads every file

Directories without one, from older versions or from others, pass. The checksum is CRC-32: it finds every flipped byte
and all but one in 4e9 of other damages, takes a quarter of a second for a gigabyte and core, and is in every Python.
It is no proof against people who change files on purpose.
"""

import fnmatch
import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_ext.errors import MegatronExtError
from megatron_ext.files import UNFINISHED, open_regular, read_json_object, write_text

MANIFEST_FILE = "manifest.json"

_FORMAT = "megatron_ext manifest 1"
_BLOCK = 1 << 22
_THREADS = 2
_SHOWN = 10


@dataclass(frozen=True)
class FileSum:
    """Size in bytes and CRC-32 of a file."""

    bytes: int
    crc32: int


class RunningSum:
    """The sum of a file that is being written, piece by piece in any order, on any number of threads.

    What lies between the pieces must be zeros, as in the holes of a file that was written at positions.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[int, FileSum]] = []

    def add(self, start: int, data: bytes | memoryview) -> None:
        """Note that `data` was written at `start`. No two pieces may overlap."""
        self._pieces.append((start, FileSum(len(data), zlib.crc32(data))))

    def sum(self) -> FileSum:
        """The sum of the file, which ends with the last piece."""
        total = FileSum(0, 0)
        for start, piece in sorted(self._pieces, key=lambda entry: entry[0]):
            if gap := start - total.bytes:
                total = joined(total, FileSum(gap, _crc_of_zeros(gap)))
            total = joined(total, piece)
        return total


def write_manifest(directory: Path, known: Mapping[str, FileSum] | None = None) -> None:
    """Write the manifest of all files below `directory`, which nobody writes to any more.

    Args:
        known: sums of files that need not be read again, by their path below `directory`.
    """
    sums = dict(known or {})
    unknown = [name for name in _files_below(directory) if name not in sums]
    with ThreadPoolExecutor(_THREADS) as pool:
        sums |= zip(unknown, pool.map(lambda name: file_sum(directory / name), unknown), strict=True)
    files = {name: {"bytes": sums[name].bytes, "crc32": f"{sums[name].crc32:08x}"} for name in sorted(sums)}
    write_text(directory / MANIFEST_FILE, json.dumps({"format": _FORMAT, "files": files}, indent=1) + "\n")


def read_manifest(directory: Path, error: type[MegatronExtError]) -> dict[str, FileSum] | None:
    """What the manifest in `directory` says of every file; None where there is none.

    Raises:
        error: it is damaged.
    """
    path = directory / MANIFEST_FILE
    if not os.path.lexists(path):
        return None
    content = read_json_object(path, error)
    files = content.get("files")
    if content.get("format") != _FORMAT or not isinstance(files, dict) or not files:
        if "format" not in content and "files" not in content:
            return None  # a file of somebody else that happens to have this name
        raise error(f"{path}: no manifest that is known here; was it changed, or written by a newer version?")
    return {name: _entry(path, name, entry, error) for name, entry in files.items()}


def check_manifest(
    directory: Path,
    error: type[MegatronExtError],
    *,
    checksums: bool = False,
    only: Sequence[str] = ("*",),
    advice: str = "take it from a copy, or make it anew",
) -> bool:
    """Compare the files of `directory` with its manifest; return whether it has one.

    Args:
        checksums: read the files too, and not only their sizes.
        only: patterns of the paths that are looked at.
        advice: the way out, the end of the message.

    Raises:
        error: naming the files that are missing or changed.
    """
    manifest = read_manifest(directory, error)
    if manifest is None:
        return False
    names = [name for name in manifest if any(fnmatch.fnmatchcase(name, pattern) for pattern in only)]
    faults = list(manifest_faults(directory, {name: manifest[name] for name in names}, checksums=checksums))
    raise_faults(directory, error, faults, advice)
    return True


def raise_faults(directory: Path, error: type[MegatronExtError], faults: Sequence[str], advice: str) -> None:
    """Raise `error` with the `faults` of a directory's files, if there are any, and the way out."""
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:_SHOWN])
        more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise error(
            f"{directory} is damaged: its files are not those that its {MANIFEST_FILE} lists\n{shown}{more}\n"
            f"{advice} (where a change is meant, remove {MANIFEST_FILE})"
        )


def manifest_faults(directory: Path, manifest: Mapping[str, FileSum], *, checksums: bool) -> Iterator[str]:
    """What is wrong with the files of `directory` that `manifest` lists, one line a file."""
    whole = []
    for name, expected in manifest.items():
        try:
            found = os.stat(directory / name)
        except OSError as fault:
            yield f"{name}: {fault.strerror}"
            continue
        if not stat.S_ISREG(found.st_mode):
            yield f"{name}: is not a regular file"
        elif found.st_size != expected.bytes:
            yield f"{name}: {found.st_size} bytes instead of {expected.bytes}"
        else:
            whole.append(name)
    if checksums:
        with ThreadPoolExecutor(_THREADS) as pool:
            sums = pool.map(lambda name: _sum_or_fault(directory / name), whole)
            for name, actual in zip(whole, sums, strict=True):
                if isinstance(actual, str):
                    yield f"{name}: {actual}"
                elif actual != manifest[name]:
                    yield f"{name}: the right size, but other content"


def file_sum(path: Path) -> FileSum:
    """Size and checksum of the file at `path`."""
    size, crc = 0, 0
    block = memoryview(bytearray(_BLOCK))
    with open_regular(path) as file:
        while count := file.readinto(block):
            size, crc = size + count, zlib.crc32(block[:count], crc)
    return FileSum(size, crc)


def joined(first: FileSum, second: FileSum) -> FileSum:
    """The sum of two files laid end to end."""
    crc, zeros, power = first.crc32, second.bytes, 0
    while zeros:
        if zeros & 1:
            crc = _apply(_after_zeros(power), crc)
        zeros, power = zeros >> 1, power + 1
    return FileSum(first.bytes + second.bytes, crc ^ second.crc32)


@cache
def _after_zeros(power: int) -> tuple[int, ...]:
    """What 2^power further bytes of zeros make of each bit of a checksum: in its bits a CRC is linear."""
    if power:
        half = _after_zeros(power - 1)
        return tuple(_apply(half, image) for image in half)
    # zlib inverts all bits before and after; the difference to what it makes of 0 is free of that.
    return tuple(zlib.crc32(b"\0", 1 << bit) ^ zlib.crc32(b"\0", 0) for bit in range(32))


def _apply(images: tuple[int, ...], crc: int) -> int:
    result, bit = 0, 0
    while crc:
        if crc & 1:
            result ^= images[bit]
        crc, bit = crc >> 1, bit + 1
    return result


def _crc_of_zeros(count: int) -> int:
    """CRC-32 of `count` zero bytes."""
    if count < _BLOCK:
        return zlib.crc32(bytes(count))
    half = FileSum(count // 2, _crc_of_zeros(count // 2))
    return joined(joined(half, half), FileSum(count % 2, zlib.crc32(bytes(count % 2)))).crc32


def _files_below(directory: Path) -> list[str]:
    """Paths of the files that a manifest lists, sorted."""
    found = (path for path in directory.rglob("*") if path.is_file() and not path.name.endswith(UNFINISHED))
    return sorted(name for path in found if (name := path.relative_to(directory).as_posix()) != MANIFEST_FILE)


def _sum_or_fault(path: Path) -> FileSum | str:
    try:
        return file_sum(path)
    except OSError as fault:
        return fault.strerror or str(fault)


def _entry(path: Path, name: str, entry: Any, error: type[MegatronExtError]) -> FileSum:
    place = PurePosixPath(name)
    try:
        if place.is_absolute() or ".." in place.parts or b"\0" in os.fsencode(name):  # ValueError: half a character
            raise ValueError
        size, crc = entry["bytes"], int(entry["crc32"], 16)
        if type(size) is not int or size < 0:
            raise ValueError
    except (TypeError, KeyError, ValueError) as fault:
        raise error(f"{path}: damaged at {name!r}") from fault
    return FileSum(size, crc)
