"""Memory of tensors as it is lived in: every storage counted while it lives, on any device, by no allocator's word."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ext.config import RunConfig
from megatron_ext.mcore.build import build_trainable
from megatron_ext.mcore.layer import offload_of
from megatron_ext.mcore.offload import Offload
from megatron_ext.runtime.device import choose_device
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.testing.tiny import SOURCES, random_batch
from megatron_ext.training.step import train_step
from megatron_ext.training.tasks.choose import task_of


class LiveMemory(TorchDispatchMode):
    """While inside, counts the bytes of all storages that operations of this process return.

    What a kernel allocates and frees within itself is not seen, nor what stood before unless an operation returns it.

    Attributes:
        peak: the most since the beginning, or since `reset_peak`, in bytes.
        offload: what it has in the host's memory does not count, on a machine that has no other memory either.
    """

    offload: Offload | None = None

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._all = self.peak = 0
        self._known: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(returned):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._see(leaf.untyped_storage())
        return returned

    @property
    def live(self) -> int:
        """Bytes now."""
        return self._all - (self.offload.held if self.offload else 0)

    def reset_peak(self) -> None:
        """Forget what was more than what lives now."""
        self.peak = self.live

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def forget(_: Any) -> None:
            if (known := self._known.pop(key, None)) is not None:
                self._all -= known[0]

        # Python's storage lives as long as what it stands for, also where autograd alone holds that.
        self._known[key] = (size, weakref.ref(storage, forget))
        self._all += size
        self.peak = max(self.peak, self.live)


@dataclass(frozen=True)
class MeasuredMemory:
    """Bytes of one rank's tensors."""

    state: int
    """Between steps: weights, gradients, optimizer, and buffers that stay."""
    peak: int
    """The most during a step."""
    on_host: int
    """Bytes of activations that were in the host's memory at most, and are not among the others."""


def measure_step(run: RunConfig) -> MeasuredMemory:
    """Train `run` for two steps on random tokens, as one rank of the running process group; the second counts."""
    with LiveMemory() as memory:
        groups = split_process_group(run.parallel, run.runtime)
        trainable = build_trainable(run, groups, choose_device(run.runtime))
        task = task_of(run.task, run.model, groups, run.adapters)
        memory.offload = offload_of(trainable.chunks)
        state = 0
        for step in range(2):
            batch = random_batch(
                step,
                samples=run.train.global_batch_size,
                micro_batch=run.train.micro_batch_size,
                dp_rank=groups.dp.rank(),
                dp_size=groups.dp.size(),
                vocabulary=run.model.vocab_size,
                length=run.data.sequence_length,
            )
            state = memory.live
            memory.reset_peak()
            train_step(trainable, task, batch, groups, max_norm=run.optimizer.clip_grad, num_sources=SOURCES)
    trainable.release()
    return MeasuredMemory(state, memory.peak, memory.offload.most_held if memory.offload else 0)
