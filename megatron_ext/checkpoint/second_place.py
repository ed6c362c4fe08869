"""The second place of a run's checkpoints: a directory, or whatever fsspec opens by URL (gs://, s3://, ...).

A checkpoint is complete there once its manifest is, which is written last. In a directory it also gets its name last,
so that every tool may read it there; elsewhere renaming would be another copy.
"""

import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec

from megatron_ext.checkpoint.find import TRACKER_FILE
from megatron_ext.checkpoint.publish import remove_leftovers
from megatron_ext.checkpoint.run_file import RUN_FILE
from megatron_ext.config.yaml_text import parse_yaml
from megatron_ext.errors import CheckpointError
from megatron_ext.files import UNFINISHED
from megatron_ext.manifest import MANIFEST_FILE, FileSum, read_manifest

_NAME = re.compile(r"iter_\d{7,}")
_BLOCK = 1 << 23
_THREADS = 4


class SecondPlace:
    """Copies of whole checkpoints, by their names.

    Everything here may take long, and fails with a CheckpointError that names the place.

    Args:
        url: a directory or a URL; `checkpoint.copy_to`.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        with self._named("cannot be opened"):
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        self._is_directory = "://" not in url

    def complete(self) -> list[str]:
        """The names of the complete copies, oldest first."""
        with self._named("cannot be read"):
            self._files.invalidate_cache()
            if not self._files.isdir(self._root):
                return []
            entries = (path.rstrip("/").rsplit("/", 1)[-1] for path in self._files.ls(self._root, detail=False))
            names = [name for name in entries if _NAME.fullmatch(name)]
            whole = [name for name in names if self._files.isfile(self._path(name, MANIFEST_FILE))]
        return sorted(whole, key=lambda name: int(name[5:]))

    def send(self, checkpoint: Path, goes_on: Callable[[], bool]) -> bool:
        """Copy a complete checkpoint here, and compare what is read with its manifest; False where it was ended.

        Args:
            goes_on: asked between two pieces.
        """
        manifest = read_manifest(checkpoint, CheckpointError)
        if manifest is None:
            raise CheckpointError(f"{checkpoint} has no {MANIFEST_FILE}, so that a copy could not be told complete")
        unfinished = checkpoint.name + (UNFINISHED if self._is_directory else "")
        with self._named(f"{checkpoint.name} was not copied"):
            if self._is_directory:
                remove_leftovers(Path(self._root))
            self._remove(unfinished)
            self._makedirs(unfinished, manifest)

            def put(name: str) -> bool:
                with open(checkpoint / name, "rb") as source, self._create(unfinished, name) as target:
                    return _copied(source, target, manifest[name], checkpoint / name, goes_on)

            with ThreadPoolExecutor(_THREADS) as pool:
                if not all(pool.map(put, manifest)):
                    return False
            with open(checkpoint / MANIFEST_FILE, "rb") as source, self._create(unfinished, MANIFEST_FILE) as target:
                target.write(source.read())
            if self._is_directory:
                self._remove(checkpoint.name)
                os.rename(self._path(unfinished), self._path(checkpoint.name))
            with self._create("", TRACKER_FILE) as target:
                target.write(f"{int(checkpoint.name[5:])}\n".encode())
        return True

    def fetch(self, name: str, partial: Path) -> None:
        """Copy one back into the new folder `partial`, compared with its manifest."""
        with self._named(f"{name} was not brought back"):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            with self._files.open(self._path(name, MANIFEST_FILE), "rb") as source:
                (partial / MANIFEST_FILE).write_bytes(source.read())
            manifest = read_manifest(partial, CheckpointError) or {}

            def get(file: str) -> bool:
                (partial / file).parent.mkdir(exist_ok=True)
                with self._files.open(self._path(name, file), "rb") as source, open(partial / file, "wb") as target:
                    return _copied(source, target, manifest[file], self._path(name, file), lambda: True)

            with ThreadPoolExecutor(_THREADS) as pool:
                all(pool.map(get, manifest))

    def require_run(self, name: str, directory: Path) -> None:
        """Raise where the complete copy `name` is of a run that is called otherwise than that in `directory`."""
        with self._named(f"{name}/{RUN_FILE} cannot be read"):
            with self._files.open(self._path(name, RUN_FILE), "rb") as source:
                saved = parse_yaml(source.read().decode(), source=RUN_FILE) or {}
            there = saved.get("checkpoint", {}).get("directory")
        other, own = Path(there or directory).absolute().name, directory.absolute().name
        if other != own:
            raise CheckpointError(
                f"checkpoint.copy_to = {self.url} holds copies of another run, {other}: this one, {own}, would go on "
                f"from them and remove them. Give it a place of its own; to go on from {name} under a new name, copy "
                f"it into {directory} too"
            )

    def remove(self, name: str) -> None:
        """Remove a copy; what is left of it if that is interrupted looks complete to nobody."""
        with self._named(f"{name} was not removed"):
            if self._files.isfile(self._path(name, MANIFEST_FILE)):
                self._files.rm_file(self._path(name, MANIFEST_FILE))
            self._remove(name)

    def _remove(self, name: str) -> None:
        self._files.invalidate_cache()
        if self._files.exists(self._path(name)):
            self._files.rm(self._path(name), recursive=True)

    def _makedirs(self, name: str, manifest: Mapping[str, FileSum]) -> None:
        for folder in sorted({self._path(name, file).rsplit("/", 1)[0] for file in manifest} | {self._path(name)}):
            self._files.makedirs(folder, exist_ok=True)

    @contextmanager
    def _create(self, name: str, file: str) -> Iterator[IO[bytes]]:
        """A new file; on the disk, in a directory, when it is closed."""
        with self._files.open(self._path(name, file), "wb") as target:
            yield target
            if self._is_directory:
                target.flush()
                os.fsync(target.fileno())

    def _path(self, *parts: str) -> str:
        return "/".join([self._root, *(part for part in parts if part)])

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # noqa: BLE001 - file systems of others fail in any way
            why = str(error) or type(error).__name__
            raise CheckpointError(f"checkpoint.copy_to = {self.url}: {what}: {why}") from error


def _copied(source: Any, target: Any, expected: FileSum, name: Path | str, goes_on: Callable[[], bool]) -> bool:
    """Copy a file whose sum is `expected`; False where it was ended."""
    size, crc = 0, 0
    while block := source.read(_BLOCK):
        if not goes_on():
            return False
        target.write(block)
        size, crc = size + len(block), zlib.crc32(block, crc)
    if FileSum(size, crc) != expected:
        raise CheckpointError(f"{name} is not what its {MANIFEST_FILE} lists: it is not copied")
    return True
