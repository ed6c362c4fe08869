"""The cache of sample indices: megatron-core builds them, here they appear as a whole or not at all.

megatron-core writes an index file by file under its last name and believes whatever has that name. Killed there, or on
a full disk, it could never read it again. So each index gets a folder of its own, which is built beside and renamed,
and is compared with its checksums before it is used.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_ext.data.indexed import sync
from megatron_ext.errors import DataError
from megatron_ext.files import UNFINISHED
from megatron_ext.manifest import MANIFEST_FILE, check_manifest, write_manifest

T = TypeVar("T")
_ABANDONED = 86400.0
"""Seconds after which nobody is still building what is unfinished."""

log = logging.getLogger(__name__)


def with_index(cache: Path, identity: Mapping[str, Any], make: Callable[[str], T]) -> T:
    """What `make` makes of the folder for the index of `identity`; rank 0 has it built there where it is missing.

    Args:
        identity: all that the index depends on.
        make: given a folder, reads the index there, or builds it where the folder is empty (on rank 0).

    Raises:
        DataError: the index cannot be written, or this rank does not see what rank 0 wrote.
    """
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
    folder = cache / f"index-{digest}"
    if dist.get_rank() == 0:
        if not _is_whole(folder):
            _build(folder, make)
    elif not (folder / MANIFEST_FILE).is_file():
        raise DataError(f"data.cache_dir = {cache}: rank 0 built {folder.name} there, but {_here()} does not see it")
    return make(str(folder))


def _is_whole(folder: Path) -> bool:
    try:
        return check_manifest(folder, DataError, checksums=True)
    except DataError as error:
        log.warning("%s; the index is built anew", str(error).splitlines()[0])
        return False


def _build(folder: Path, make: Callable[[str], Any]) -> None:
    """Build an index beside `folder` and give it its name. Several runs may do so at once."""
    beside = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}{UNFINISHED}")
    try:
        _remove_abandoned(folder)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        make(str(beside))
        write_manifest(beside)
        for path in beside.iterdir():
            with open(path, "rb+") as file:
                sync(file)
        _publish(beside, folder)
    except OSError as error:
        why = f"{error.strerror or error}"
        raise DataError(f"data.cache_dir = {folder.parent}: no index can be written there ({why})") from error
    except MemoryError as error:
        raise DataError(
            f"the order of so many samples does not fit into memory ({error}); lower train.train_iters or "
            "train.global_batch_size"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _publish(beside: Path, folder: Path) -> None:
    """Rename; what is damaged there goes, what another run has put there meanwhile stays."""
    try:
        beside.rename(folder)
    except OSError:
        if folder.is_dir() and _is_whole(folder):
            return
        aside = beside.with_name(f"{beside.name}.old{UNFINISHED}")
        folder.rename(aside)
        beside.rename(folder)
        shutil.rmtree(aside)


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed processes have left of this index."""
    for path in folder.parent.glob(f"{folder.name}.*{UNFINISHED}"):
        with contextlib.suppress(OSError):  # another run does the same
            if time.time() - path.stat().st_mtime > _ABANDONED:
                shutil.rmtree(path)


def _here() -> str:
    return f"rank {dist.get_rank()} on {socket.gethostname()}"
