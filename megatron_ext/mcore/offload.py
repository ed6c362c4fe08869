"""Activations in the host's memory: what layers keep goes there, and comes back before their backward pass."""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""Where to, where from."""


class HostCopies:
    """Copies between a device and its host: on a GPU by a stream of its own, elsewhere done when they are called for.

    Page-locked memory is torch's, which keeps what is let go for the next that asks, once the copies from it are over.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def memory(self, like: Tensor) -> Tensor:
        """Memory of the host for as much as `like` has."""
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)

    def start(self, pairs: Sequence[Pair], device: torch.device) -> Any:
        """Copy what computing has done by now, beside what it does from now on; returns what `wait` takes."""
        if device.type != "cuda":
            for target, source in pairs:
                target.copy_(source)
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, copied: Any, device: torch.device) -> None:
        """Have computing go on after those copies only; the host itself waits for nothing."""
        if copied is not None:
            torch.cuda.current_stream(device).wait_event(copied)


class _Storage:
    """One storage that a layer keeps: on the device, in the host's memory, or in both while it is on its way."""

    def __init__(self, storage: torch.UntypedStorage, device: torch.device) -> None:
        self.here: Tensor | None = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
        self.there: Tensor | None = None
        self._versions: list[tuple[Tensor, int]] = []

    def note(self, tensor: Tensor) -> None:
        """Remember what the numbers of `tensor` are by now; without its graph, which has this in it."""
        self._versions.append((tensor.detach(), tensor._version))

    def require_unchanged(self) -> None:
        """Raise where numbers were changed in place since they were kept: a gradient of them would be wrong.

        Autograd says so of all that it keeps itself, not of what hooks keep for it.
        """
        for tensor, version in self._versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"a tensor of shape {tuple(tensor.shape)}, needed for the backward pass and on its way to the "
                    f"host's memory, was changed in place (version {tensor._version}, kept as {version})"
                )

    def leave(self) -> None:
        """It is in the host's memory: the device's may go."""
        self.require_unchanged()
        self._versions.clear()
        self.here = None


@dataclass(frozen=True)
class _View:
    """A kept tensor: which part of which storage."""

    storage: _Storage
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        """As it was kept."""
        here = self.storage.here
        assert here is not None
        empty = torch.empty(0, dtype=self.dtype, device=here.device)
        return empty.set_(here.untyped_storage(), self.offset, self.size, self.stride)


class _Pass:
    """One micro-batch's way through one layer.

    Autograd's nodes own the storages: as without this, each is free once its readers are done.

    Attributes:
        is_out: whether what is kept is in the host's memory alone.
    """

    def __init__(self, offload: "Offload", device: torch.device, others: set[int]) -> None:
        self._offload, self._device, self._others = offload, device, others
        self._found: dict[int, _Storage] = {}
        self._storages: list[weakref.ref[_Storage]] = []
        self.is_out = False
        self._copied: Any = None
        self._coming: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor | _View:
        """What is kept in the place of `tensor`, which stays where it is if it is small or not the layer's own."""
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if tensor.device != self._device or storage.nbytes() < self._offload.smallest or place in self._others:
            return tensor
        if place not in self._found:
            self._found[place] = _Storage(storage, self._device)
        kept = self._found[place]
        kept.note(tensor)
        return _View(kept, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, packed: Tensor | _View) -> Tensor:
        """What was kept; its backward pass has begun."""
        if isinstance(packed, Tensor):
            return packed
        self._offload.need(self)
        packed.storage.require_unchanged()
        return packed.tensor()

    def start_out(self) -> None:
        """The layer's forward pass is over: copy to the host what is still wanted of it."""
        self._storages = [weakref.ref(storage) for storage in self._found.values()]
        self._found.clear()
        pairs = []
        for storage in self._alive():
            storage.require_unchanged()
            assert storage.here is not None
            storage.there = self._offload.memory(storage.here)
            pairs.append((storage.there, storage.here))
        self._copied = self._offload.copies.start(pairs, self._device)

    def finish_out(self) -> None:
        """Free the device's memory, in computing's order: whatever gets it next is computed after the copies."""
        self._offload.copies.wait(self._copied, self._device)
        for storage in self._alive():
            storage.leave()
        self.is_out = True

    def stay(self) -> None:
        """It is needed before it has gone."""
        for storage in self._alive():
            storage.there = None

    def start_back(self) -> None:
        """Copy to the device what is in the host's memory, last kept first."""
        self.is_out = False
        pairs = []
        for storage in reversed(self._alive()):
            assert storage.there is not None
            # Allocated among what computes, and the copies come after all that computes now: no other has it still.
            storage.here = torch.empty(storage.there.shape, dtype=torch.uint8, device=self._device)
            pairs.append((storage.here, storage.there))
            storage.there = None
        self._copied = self._offload.copies.start(pairs, self._device)
        self._coming = [target for target, _ in pairs]

    def finish_back(self) -> None:
        """Have computing wait for what comes; until then nobody else gets its memory."""
        if self._coming:
            self._offload.copies.wait(self._copied, self._device)
            self._coming = []

    def _alive(self) -> list[_Storage]:
        return [storage for reference in self._storages if (storage := reference()) is not None]


class Offload:
    """What the layers of one rank have in its host's memory.

    While a layer computes, what the layer before it keeps goes out; when the backward pass of a layer begins, what the
    layer before it keeps comes back. So the device has that of two layers at a time. Tensors are taken from autograd
    (`saved_tensors_hooks`), storage by storage, each once, whichever views of it are kept; they come back bit for bit.

    Args:
        smallest: bytes of a storage below which it stays: a copy takes microseconds to begin.

    Attributes:
        held: bytes in the host's memory now.
        most_held: the most since the beginning.
        current: the pass through a layer that is under way, where that moves what it keeps.
    """

    def __init__(self, smallest: int, copies: HostCopies | None = None) -> None:
        self.smallest, self.copies = smallest, copies or HostCopies()
        self.held = self.most_held = 0
        self.current: _Pass | None = None
        self._before: _Pass | None = None
        self._going: _Pass | None = None
        self._coming: _Pass | None = None

    @contextlib.contextmanager
    def around(
        self, layer: torch.nn.Module, hidden: Tensor, *, is_first: bool, moves: bool
    ) -> Iterator["_Pass | None"]:
        """While open `layer` computes.

        Args:
            hidden: its input. What a stage got from another is the schedule's, which keeps it on the device anyway.
            is_first: of its chunk.
            moves: whether what it keeps goes to the host; what the layer before keeps goes in any case.

        Yields:
            The pass through the layer before, for `comes_before`.
        """
        before = None if is_first else self._before
        if moves:
            others = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
            if hidden.is_leaf and hidden.requires_grad:
                others.add(hidden.untyped_storage().data_ptr())
            self.current = _Pass(self, hidden.device, others)
        try:
            with self._keeping():
                yield before
            self._settle()
            if self.current is not None:
                self.current.start_out()
            self._going = self._before = self.current
        finally:
            self.current = None

    def _keeping(self) -> contextlib.AbstractContextManager[Any]:
        if self.current is None:
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self.current.pack, self.current.unpack)

    def comes_before(self, before: "_Pass | None", output: Tensor) -> None:
        """Have what the layer before keeps come back when the gradient of `output` is there."""
        if before is not None and output.requires_grad:
            output.register_hook(lambda _: self._start_back(before))

    def need(self, one: _Pass) -> None:
        """Have all of `one` on the device for what computes next."""
        if self._going is one:
            one.stay()
            self._going = None
        self._start_back(one)
        one.finish_back()

    def _start_back(self, one: _Pass) -> None:
        self._settle()
        if one.is_out:
            if self._coming is not None:
                self._coming.finish_back()
            # Held here: if nobody asks for it after all, its memory must not go to another while copies write there.
            self._coming = one
            one.start_back()

    def _settle(self) -> None:
        """What is going out is out, as far as what computes next is concerned."""
        if self._going is not None:
            self._going.finish_out()
            self._going = None

    def memory(self, here: Tensor) -> Tensor:
        """Memory of the host for as much as `here` has, counted while it lives."""
        self._count(here.nbytes)
        there = self.copies.memory(here)
        weakref.finalize(there, self._count, -here.nbytes)
        return there

    def _count(self, size: int) -> None:
        self.held += size
        self.most_held = max(self.most_held, self.held)
