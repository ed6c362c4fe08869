"""Bytes of tensors from and to files at given positions: safe on several threads, and never partly done."""

import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.checkpoint.shards import Shape
from megatron_ext.files import writing
from megatron_ext.manifest import FileSum, RunningSum

# Linux transfers at most 2 GiB less a page in one call.
_MOST = 1 << 30
# Bytes of the buffer between a file and memory that takes them otherwise.
_BUFFER = 1 << 26
# Bytes below which reading is cheaper than mapping.
_MAPPED_FROM = 1 << 16


def read_bytes(descriptor: int, start: int, count: int) -> bytes:
    """`count` bytes at `start`; EOFError where the file ends before."""
    data = os.pread(descriptor, count, start)
    if len(data) < count:
        raise EOFError
    return data


def read_into(descriptor: int, start: int, target: Tensor) -> None:
    """Fill the contiguous `target` with the bytes at `start`; EOFError where the file ends before."""
    view = memory_of(target)
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done : done + _MOST]], start + done)
        if count == 0:
            raise EOFError
        done += count


class OutputFile:
    """A new file that is written at positions, on any number of threads; its checksum is taken on the way.

    What goes wrong is an OSError with the file's name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - finish() and abandon() close it
        self._running = RunningSum()

    def write(self, start: int, data: memoryview | bytes) -> None:
        """Write all of `data` at `start`."""
        view, done = memoryview(data), 0
        self._running.add(start, view)
        with writing(self.path):
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done : done + _MOST], start + done)

    def reserve(self, length: int) -> None:
        """Give the file its `length` in bytes before all of them are written."""
        with writing(self.path):
            self._file.truncate(length)

    def finish(self, *, sync: bool) -> FileSum:
        """Close the file, with `sync` only once everything is on disk."""
        with writing(self.path):
            if sync:
                os.fsync(self._file.fileno())
            self._file.close()
        return self._running.sum()

    def abandon(self) -> None:
        """Close the file after a failure."""
        self._file.close()


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class TensorPlace:
    """The elements of a dense row-major tensor inside a file."""

    start: int
    """Position of the first element in the file, in bytes."""
    shape: Shape
    dtype: torch.dtype

    def read_box(self, descriptor: int, box: tuple[slice, ...], target: Tensor) -> None:
        """Fill `target` with the elements at `box`, converting the dtype where it differs.

        Reads the shortest run of the file that holds the box; straight into `target` where the box is that run and
        `target` lies in the host's memory. Else through a buffer, which stays small however large the box is.

        Raises:
            EOFError: the file is shorter.
        """
        run = self._run(box)
        if run.is_box and target.dtype == self.dtype and target.is_contiguous() and target.device.type == "cpu":
            read_into(descriptor, run.start, target)
            return
        axis = next((axis for axis, size in enumerate(run.sizes) if size > 1), None)
        if run.count * self.dtype.itemsize > _BUFFER and axis is not None:
            start, stop = box[axis].start, box[axis].stop
            middle = (start + stop) // 2
            for begin, end in ((start, middle), (middle, stop)):
                part = (*box[:axis], slice(begin, end), *box[axis + 1 :])
                self.read_box(descriptor, part, target.narrow(axis, begin - start, end - begin))
            return
        elements = torch.empty(run.count, dtype=self.dtype)
        read_into(descriptor, run.start, elements)
        target.copy_(elements.as_strided(run.sizes, run.strides))

    def map_box(self, descriptor: int, box: tuple[slice, ...]) -> Tensor | None:
        """The elements at `box` in the system's own memory of the file, without a copy; None where that cannot be.

        Writing into the tensor does not change the file. A file that is cut short while the tensor is in use ends the
        process (SIGBUS), as with every reader that maps files.
        """
        run = self._run(box)
        size = run.count * self.dtype.itemsize
        if not run.is_box or size < _MAPPED_FROM or run.start % self.dtype.itemsize:
            return None
        if os.fstat(descriptor).st_size < run.start + size:
            raise EOFError
        inside = run.start % mmap.ALLOCATIONGRANULARITY
        try:
            memory = mmap.mmap(descriptor, size + inside, offset=run.start - inside, access=mmap.ACCESS_COPY)
        except OSError:
            return None  # a file system that cannot
        memory.madvise(mmap.MADV_WILLNEED)
        flat = torch.frombuffer(memory, dtype=self.dtype, count=run.count, offset=inside)
        return flat.view(run.sizes)

    def _run(self, box: tuple[slice, ...]) -> "_Run":
        strides = torch.empty(self.shape, device="meta").stride()
        sizes = tuple(part.stop - part.start for part in box)
        first = sum(part.start * stride for part, stride in zip(box, strides, strict=True))
        count = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if 0 in sizes:
            first = count = 0
        is_box = count == math.prod(sizes)
        return _Run(self.start + first * self.dtype.itemsize, count, sizes, strides, is_box)


@dataclass(frozen=True)
class _Run:
    """The shortest stretch of a file that holds a box of a tensor."""

    start: int
    count: int
    """Elements from the box's first to its last."""
    sizes: Shape
    strides: Shape
    is_box: bool
    """Whether there is nothing else in between."""
