"""Host memory that a rank's shards are copied into, so that training may change them while the copies are written.

It is allocated at the first save and used by all later ones; page-locked where the shards lie on a GPU, which copies
into nothing else at full speed.
"""

import contextlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.checkpoint.shards import TensorShard

log = logging.getLogger(__name__)

_BLOCK = 1 << 28
"""Bytes of one allocation, unless a shard is larger. CUDA's page-locked memory comes in powers of two."""
_ALIGNMENT = 64
_SPARE = 1 << 30
"""Bytes that are left to everybody else on the host."""


class HostMemory:
    """Copies of the shards that this rank writes.

    Args:
        sharers: how many ranks of this host copy at the same time.
    """

    def __init__(self, sharers: int = 1) -> None:
        self._sharers = sharers
        self._layout: tuple[tuple[int, torch.dtype], ...] = ()
        self._copies: list[Tensor] = []
        """Flat, each with a storage of its own, so that it is written to a file as it lies."""
        self._warned = False

    def copied(self, shards: Iterable[TensorShard]) -> list[TensorShard] | None:
        """The shards that this rank writes, as they are now; None, with a warning, where the host has no room for them.

        What an earlier call returned is overwritten.
        """
        written = [shard for shard in shards if shard.is_writer]
        if not self._reserve([shard.data for shard in written]):
            return None
        copies = [copy.view(shard.data.shape) for copy, shard in zip(self._copies, written, strict=True)]
        for copy, shard in zip(copies, written, strict=True):
            copy.copy_(shard.data, non_blocking=True)
        for device in {shard.data.device for shard in written if shard.data.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return [replace(shard, data=copy) for copy, shard in zip(copies, written, strict=True)]

    def _reserve(self, tensors: Sequence[Tensor]) -> bool:
        """Have a copy of the size of each tensor; whether there is room."""
        layout = tuple((tensor.numel(), tensor.dtype) for tensor in tensors)
        if layout == self._layout:
            return True
        self._copies, self._layout = [], ()
        needed = sum(map(_room_of, tensors))
        if (free := available_memory()) is not None and needed * self._sharers > free - _SPARE:
            if not self._warned:
                log.warning(
                    "checkpoint.async_save: copies of this host's shards take %.1f GB of its memory, of which %.1f are "
                    "free; it trains on only once they are written",
                    needed * self._sharers / 1e9,
                    free / 1e9,
                )
            self._warned = True
            return False
        locked = any(tensor.is_cuda for tensor in tensors)
        for block in _blocks(tensors):
            memory = torch.empty(sum(map(_room_of, block)), dtype=torch.uint8, pin_memory=locked).numpy()
            start = 0
            for tensor in block:
                size = tensor.numel() * tensor.itemsize
                # From numpy, not a view: a view has the storage of the whole block.
                self._copies.append(torch.from_numpy(memory[start : start + size]).view(tensor.dtype))
                start += _room_of(tensor)
        self._layout = layout
        return True


def _room_of(tensor: Tensor) -> int:
    """Bytes of a tensor with what aligns the next one."""
    return -(-tensor.numel() * tensor.itemsize // _ALIGNMENT) * _ALIGNMENT


def _blocks(tensors: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """The tensors in their order, in blocks of one allocation each."""
    block: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if block and size + _room_of(tensor) > _BLOCK:
            yield block
            block, size = [], 0
        block.append(tensor)
        size += _room_of(tensor)
    if block:
        yield block


def available_memory() -> int | None:
    """Bytes that this process's host, or its control group, still has; None where neither says."""
    rooms = []
    with contextlib.suppress(OSError, KeyError, ValueError):
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        rooms.append(int(fields["MemAvailable"].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        own = Path("/proc/self/cgroup").read_text().split("::", 1)[-1].splitlines()[0].strip("/")
        group = Path("/sys/fs/cgroup") / own
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Pages of files are given back when they are needed.
        used = int((group / "memory.current").read_text()) - int(counts.get("inactive_file", 0))
        rooms.append(int((group / "memory.max").read_text()) - used)
    return min(rooms, default=None)
