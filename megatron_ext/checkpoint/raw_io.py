"""Bytes of tensors from and to files at given positions: safe on several threads, and never partly done."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.checkpoint.boxes import Shape

# Linux transfers at most 2 GiB less a page in one call.
_MOST = 1 << 30


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


def write_at(descriptor: int, start: int, data: memoryview | bytes) -> None:
    """Write all of `data` at `start`."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + _MOST], start + done)


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

        Reads the shortest run of the file that holds the box; straight into `target` where the box is that run.

        Raises:
            EOFError: the file is shorter.
        """
        strides = torch.empty(self.shape, device="meta").stride()
        sizes = [part.stop - part.start for part in box]
        first = sum(part.start * stride for part, stride in zip(box, strides, strict=True))
        count = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        where = self.start + first * self.dtype.itemsize
        if count == target.numel() and target.dtype == self.dtype and target.is_contiguous():
            read_into(descriptor, where, target)
            return
        run = torch.empty(count, dtype=self.dtype)
        read_into(descriptor, where, run)
        target.copy_(run.as_strided(sizes, strides))
