"""Streams of full, canonically named tensors from and to checkpoints, in one process and with few tensors in memory.

A `TensorSource` is read by name in any order; a `TensorSink` is told beforehand what it will hold and is then written
by name in any order. Both exist for a Megatron checkpoint (here) and for a Hugging Face one (hf_directory.py).
"""

import contextlib
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ext.canonical.naming import storage_plan, stored_names
from megatron_ext.checkpoint.find import checkpoint_name, find_checkpoint, require_checkpoint
from megatron_ext.checkpoint.integrity import require_whole
from megatron_ext.checkpoint.publish import CHECKPOINT_CONTENTS, publish, write_small_files
from megatron_ext.checkpoint.shards import Shape
from megatron_ext.checkpoint.state_file import UNTRAINED
from megatron_ext.checkpoint.torch_dist import TensorArchive, TorchDistReader, TorchDistWriter, write_metadata
from megatron_ext.errors import ConversionError
from megatron_ext.files import (
    UNFINISHED,
    output_place,
    publish_directory,
    remove_unfinished,
    start_directory,
    unfinished_place,
)
from megatron_ext.locks import LOCK_FILE, exclusive, exclusive_output
from megatron_ext.manifest import FileSum, write_manifest

# A system lets one thread at a time write into a file.
_FILES = 4


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor."""

    shape: Shape
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Named tensors that can be read one at a time, on any number of threads."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor."""

    def read(self, name: str) -> Tensor:
        """One whole tensor, on the CPU."""


@dataclass(frozen=True)
class Prepared:
    """A tensor in the form in which a sink stores it."""

    name: str
    content: Any


class TensorSink(ABC):
    """Takes the tensors that `specs` announced, each once; complete only when all have come.

    As a context manager it publishes its output on success and leaves nothing behind on failure. Output is not forced
    through to the disk: after a power cut, convert again.

    `write` is for one thread. On several, each tensor goes through `prepare`, `claim` and `store`; only `claim` must
    not be called by two at once, and its order is the order inside the files.
    """

    contents: tuple[str, ...]
    """Name patterns of what a finished output of this kind holds."""

    def __init__(
        self, target: Path, specs: Mapping[str, TensorSpec], *, force: bool, inputs: Sequence[Path] = ()
    ) -> None:
        target = output_place(target, ConversionError, force=force, contents=self.contents, inputs=inputs)
        self.target, self.specs = target, dict(specs)
        self.partial = unfinished_place(target)
        self.total_bytes = sum(spec.bytes for spec in self.specs.values())
        self._waiting = set(self.specs)
        self._made: list[Path] = []
        self._started = self._finished = False
        self._replace = force
        self._lock = contextlib.ExitStack()

    def write(self, name: str, tensor: Tensor) -> None:
        """Take one tensor, converted to the announced dtype.

        Raises:
            ConversionError: it was not announced, came before, or has another shape; or it cannot be written.
        """
        prepared = self.prepare(name, tensor)
        self.claim(prepared)
        self.store(prepared)

    def prepare(self, name: str, tensor: Tensor) -> Prepared:
        """Check one tensor and bring it into the form in which it is stored; it may be kept until `store`."""
        if name not in self._waiting:
            raise ConversionError(f"{name}: {'written twice' if name in self.specs else 'not part of the target'}")
        spec = self.specs[name]
        if tuple(tensor.shape) != spec.shape:
            raise ConversionError(f"{name}: is {list(tensor.shape)}, the target has {list(spec.shape)}")
        converted = tensor.detach().cpu().to(spec.dtype)
        if spec.dtype is torch.float16 and tensor.dtype is not torch.float16:
            _check_range(name, tensor, converted)
        return Prepared(name, self._prepare(name, converted))

    def claim(self, prepared: Prepared) -> None:
        """Give a prepared tensor its place."""
        self._waiting.remove(prepared.name)

    def store(self, prepared: Prepared) -> None:
        """Write a prepared tensor to its place."""
        try:
            self._store(prepared)
        except OSError as error:
            raise ConversionError(f"{self.target}: cannot write {prepared.name}: {error.strerror}") from error

    @abstractmethod
    def _prepare(self, name: str, tensor: Tensor) -> Any:
        """The form in which `tensor` is stored."""

    @abstractmethod
    def _store(self, prepared: Prepared) -> None:
        """Write one tensor to where it belongs."""

    @abstractmethod
    def _open(self) -> None:
        """Make the files."""

    @abstractmethod
    def _close(self) -> None:
        """Close the files; also called after a failure."""

    @abstractmethod
    def _sums(self) -> dict[str, FileSum]:
        """The sums of the closed files, by their names."""

    def _complete(self) -> None:  # noqa: B027 - not every output has more
        """Write what a finished output holds besides the tensors."""

    def _publish(self) -> None:
        publish_directory(self.partial, self.target, replace=self._replace)

    def _exclusive(self) -> contextlib.AbstractContextManager[object]:
        """The lock under which the output is written."""
        return exclusive_output(self.target, "writing a model")

    def finish(self) -> None:
        """Complete the output at its unfinished place, `partial`, where it can be examined before it gets its name.

        Raises:
            ConversionError: tensors are missing.
        """
        self._close()
        if self._waiting:
            missing = ", ".join(sorted(self._waiting)[:10])
            raise ConversionError(f"{len(self._waiting)} tensors of the target were never written: {missing}")
        self._complete()
        self._finished = True

    def __enter__(self) -> "TensorSink":
        self._made = [folder for folder in self.partial.parents if not folder.exists()]
        try:
            self._lock.enter_context(self._exclusive())
            remove_unfinished(self.partial)  # it also takes space
            self._require_space()
            start_directory(self.target)
            self._started = True
            self._open()
        except OSError as error:
            self._clear_up()
            raise ConversionError(f"{self.target}: cannot be written: {error.strerror}") from error
        except BaseException:
            self._clear_up()
            raise
        return self

    def _require_space(self) -> None:
        """Raise ConversionError where the tensors have no room on the disk."""
        folder = next(folder for folder in self.partial.absolute().parents if folder.exists())
        free = shutil.disk_usage(folder).free
        if self.total_bytes > free:
            raise ConversionError(
                f"{self.target}: needs {self.total_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free there"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if not self._finished:
                    self.finish()
                write_manifest(self.partial, self._sums())
                self._publish()
            else:
                self._close()
        except OSError as fault:
            raise ConversionError(f"{self.target}: cannot be written: {fault.strerror}") from fault
        finally:
            self._clear_up()

    def _clear_up(self) -> None:
        if self._started:
            shutil.rmtree(self.partial, ignore_errors=True)
        self._lock.close()
        for folder in self._made:
            with contextlib.suppress(OSError):  # it holds the output, or something of somebody else
                folder.rmdir()


def _check_range(name: str, tensor: Tensor, converted: Tensor) -> None:
    """Raise ConversionError where numbers became infinite."""
    if not torch.equal(torch.isfinite(tensor), torch.isfinite(converted)):
        raise ConversionError(f"{name}: has numbers that fp16 cannot hold; use bf16 or fp32")


class MegatronSource:
    """The weights of a Megatron checkpoint, saved in any parallel layout and by either backend."""

    def __init__(self, path: str | Path) -> None:
        self.directory = require_checkpoint(path)
        require_whole(self.directory)
        self._reader = TorchDistReader(self.directory)
        self._places = stored_names({key: self._reader.shape(key) for key in self._reader.tensors})
        self.specs = {
            name: TensorSpec(self._reader.shape(place.key)[len(place.index) :], self._reader.dtype(place.key))
            for name, place in self._places.items()
        }

    def read(self, name: str) -> Tensor:
        """One whole weight."""
        place = self._places[name]
        shape = self._reader.shape(place.key)
        within = len(place.index)
        offset = place.index + (0,) * (len(shape) - within)
        size = (1,) * within + shape[within:]
        return self._reader.read(place.key, offset, size).reshape(shape[within:])


class MegatronSink(TensorSink):
    """Writes a Megatron checkpoint at step 0, weights only, that any layout can load.

    Args:
        directory: checkpoint directory; the checkpoint becomes its `iter_0000000`.
        specs: canonical names with shapes and dtypes.
        run: the configuration to keep beside the weights, as plain mappings.
        scalars: what its state says.
        tokenizer: directory whose tokenizer the checkpoint carries.
        force: replace what is there.
        inputs: what the tensors are made of; never replaced.
    """

    contents = CHECKPOINT_CONTENTS

    def __init__(
        self,
        directory: str | Path,
        specs: Mapping[str, TensorSpec],
        run: dict[str, Any],
        *,
        scalars: Mapping[str, Any] = UNTRAINED,
        tokenizer: Path | None = None,
        force: bool = False,
        inputs: Sequence[Path] = (),
    ) -> None:
        directory = Path(directory)
        if (newest := find_checkpoint(directory)) is not None and newest.name != checkpoint_name(0):
            raise ConversionError(f"{directory} holds a training run ({newest.name}); choose another place")
        present = (
            [p.name for p in directory.iterdir() if p.suffix != UNFINISHED and p.name != LOCK_FILE]
            if directory.is_dir()
            else []
        )
        if present and not force:
            raise ConversionError(
                f"{directory} is not empty; choose another place or pass --force to replace its step 0"
            )
        super().__init__(directory / checkpoint_name(0), specs, force=force, inputs=inputs)
        self._run, self._scalars, self._tokenizer = run, scalars, tokenizer
        self._plan = storage_plan({name: spec.shape for name, spec in specs.items()})
        self._writers: list[TorchDistWriter] = []
        self._starts: dict[str, tuple[TorchDistWriter, int]] = {}

    def _open(self) -> None:
        self._writers = [TorchDistWriter(self.partial, f"__0_{number}.distcp") for number in range(_FILES)]

    def _prepare(self, name: str, tensor: Tensor) -> TensorArchive:
        within = len(self._plan[name][0].index)
        return TensorArchive(tensor.reshape((1,) * within + tuple(tensor.shape)))

    def claim(self, prepared: Prepared) -> None:
        super().claim(prepared)
        place, shape = self._plan[prepared.name]
        offset = place.index + (0,) * (len(shape) - len(place.index))
        writer = min(self._writers, key=lambda one: one.length)
        self._starts[prepared.name] = writer, writer.reserve(place.key, shape, offset, prepared.content)

    def _store(self, prepared: Prepared) -> None:
        writer, start = self._starts[prepared.name]
        writer.put(prepared.content, start)

    def _close(self) -> None:
        for writer in self._writers:
            writer.finish(sync=False)

    def _sums(self) -> dict[str, FileSum]:
        return {writer.name: writer.sum for writer in self._writers}

    def _complete(self) -> None:
        write_metadata(self.partial, [record for writer in self._writers for record in writer.records])
        write_small_files(self.partial, 0, self._scalars, self._run, self._tokenizer)

    def _exclusive(self) -> contextlib.AbstractContextManager[object]:
        return exclusive(self.target.parent, "writing a model")

    def _publish(self) -> None:
        publish(self.partial, self.target, 0, sync=False, replace=self._replace)
