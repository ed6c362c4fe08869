"""Streams of full, canonically named tensors from and to checkpoints, in one process and with few tensors in memory.

A `TensorSource` is read by name in any order; a `TensorSink` is told beforehand what it will hold and is then written
by name in any order. Both exist for a Megatron checkpoint (here) and for a Hugging Face directory (safetensors.py).
"""

import contextlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ext.checkpoint.boxes import Shape
from megatron_ext.checkpoint.naming import storage_plan, stored_names
from megatron_ext.checkpoint.store import (
    CHECKPOINT_CONTENTS,
    TrainingState,
    checkpoint_name,
    find_checkpoint,
    publish,
    require_checkpoint,
    write_small_files,
)
from megatron_ext.checkpoint.torch_dist import TorchDistReader, TorchDistWriter, write_metadata
from megatron_ext.errors import CheckpointError, ConversionError
from megatron_ext.files import UNFINISHED, output_place, publish_directory


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor."""

    shape: Shape
    dtype: torch.dtype


class TensorSource(Protocol):
    """Named tensors that can be read one at a time."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor."""

    def read(self, name: str) -> Tensor:
        """One whole tensor, on the CPU."""


class TensorSink(ABC):
    """Takes the tensors that `specs` announced, each once; complete only when all have come.

    As a context manager it publishes its output on success and leaves nothing behind on failure.
    """

    contents: tuple[str, ...]
    """Name patterns of what a finished output of this kind holds."""

    def __init__(
        self, target: Path, specs: Mapping[str, TensorSpec], *, force: bool, inputs: Sequence[Path] = ()
    ) -> None:
        target = output_place(target, ConversionError, force=force, contents=self.contents, inputs=inputs)
        self.target, self.specs = target, dict(specs)
        self.partial = target.with_name(target.name + UNFINISHED)
        self._waiting = set(self.specs)
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self._made = [folder for folder in self.partial.parents if not folder.exists()]
        self.partial.mkdir(parents=True)

    def write(self, name: str, tensor: Tensor) -> None:
        """Take one tensor, converted to the announced dtype.

        Raises:
            ConversionError: it was not announced, came before, or has another shape.
        """
        if name not in self._waiting:
            raise ConversionError(f"{name}: {'written twice' if name in self.specs else 'not part of the target'}")
        spec = self.specs[name]
        if tuple(tensor.shape) != spec.shape:
            raise ConversionError(f"{name}: is {list(tensor.shape)}, the target has {list(spec.shape)}")
        self._store(name, tensor.to(spec.dtype))
        self._waiting.remove(name)

    @abstractmethod
    def _store(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to where it belongs."""

    @abstractmethod
    def _close(self) -> None:
        """Finish what was written."""

    def _publish(self) -> None:
        publish_directory(self.partial, self.target)

    def __enter__(self) -> "TensorSink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close()
            if kind is None:
                if self._waiting:
                    missing = ", ".join(sorted(self._waiting)[:10])
                    raise ConversionError(f"{len(self._waiting)} tensors of the target were never written: {missing}")
                self._publish()
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)
            for folder in self._made:
                with contextlib.suppress(OSError):  # it holds the output, or something of somebody else
                    folder.rmdir()


class MegatronSource:
    """The weights of a Megatron checkpoint, saved in any parallel layout and by either backend."""

    def __init__(self, path: str | Path) -> None:
        self.directory = require_checkpoint(path)
        self._reader = TorchDistReader(self.directory)
        self._places = stored_names({key: self._reader.shape(key) for key in self._reader.tensors})
        self.specs = {
            name: TensorSpec(self._reader.shape(place.key)[len(place.stacked) :], self._reader.dtype(place.key))
            for name, place in self._places.items()
        }

    def read(self, name: str) -> Tensor:
        """One whole weight."""
        place = self._places[name]
        shape = self._reader.shape(place.key)
        within = len(place.stacked)
        offset = place.stacked + (0,) * (len(shape) - within)
        size = (1,) * within + shape[within:]
        return self._reader.read(place.key, offset, size).reshape(shape[within:])


class MegatronSink(TensorSink):
    """Writes a Megatron checkpoint at step 0, weights only, that any layout can load.

    Args:
        directory: checkpoint directory; the checkpoint becomes its `iter_0000000`.
        specs: canonical names with shapes and dtypes.
        run: the configuration to keep beside the weights, as plain mappings.
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
        tokenizer: Path | None = None,
        force: bool = False,
        inputs: Sequence[Path] = (),
    ) -> None:
        directory = Path(directory)
        if (newest := find_checkpoint(directory)) is not None and newest.name != checkpoint_name(0):
            raise ConversionError(f"{directory} holds a training run ({newest.name}); choose another place")
        present = [p.name for p in directory.iterdir() if p.suffix != UNFINISHED] if directory.is_dir() else []
        if present and not force:
            raise ConversionError(
                f"{directory} is not empty; choose another place or pass --force to replace its step 0"
            )
        super().__init__(directory / checkpoint_name(0), specs, force=force, inputs=inputs)
        self._run, self._tokenizer = run, tokenizer
        self._plan = storage_plan({name: spec.shape for name, spec in specs.items()})
        self._writer = TorchDistWriter(self.partial)

    def _store(self, name: str, tensor: Tensor) -> None:
        place, shape = self._plan[name]
        within = len(place.stacked)
        offset = place.stacked + (0,) * (len(shape) - within)
        try:
            self._writer.write(place.key, shape, offset, tensor.reshape((1,) * within + tuple(tensor.shape)))
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{self.target}: cannot write {name}: {error}") from error

    def _close(self) -> None:
        self._records = self._writer.finish()

    def _publish(self) -> None:
        write_metadata(self.partial, self._records)
        state = TrainingState()
        write_small_files(self.partial, state, self._run, self._tokenizer)
        publish(self.partial, self.target, state.iteration)
