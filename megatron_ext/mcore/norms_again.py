"""Norms that are computed again in the backward pass, instead of being kept by what reads them."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Keeper(Protocol):
    """Keeps tensors for the backward pass, in the manner of `torch.autograd.graph.saved_tensors_hooks`."""

    def pack(self, tensor: Tensor) -> Any:
        """What is kept in the place of `tensor`."""

    def unpack(self, packed: Any) -> Tensor:
        """What was kept."""


class _AsItIs:
    def pack(self, tensor: Tensor) -> Tensor:
        return tensor

    def unpack(self, packed: Tensor) -> Tensor:
        return packed


class _Place(NamedTuple):
    """A view."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextlib.contextmanager
def computed_again(norm: torch.nn.Module, keeper: Keeper | None = None) -> Iterator[None]:
    """While open, whatever keeps the output of `norm` for its backward pass keeps the norm's input instead.

    That is kept anyway: the norm itself needs it. Each reader computes the norm once more, to the same bits.

    Args:
        keeper: keeps everything else. Of hooks within each other torch asks the inner ones alone.
    """
    output = _Output(norm, keeper or _AsItIs())
    noting = norm.register_forward_hook(output.note)
    try:
        with torch.autograd.graph.saved_tensors_hooks(output.pack, output.unpack):
            yield
    finally:
        noting.remove()
        output.let_go()


class _Output:
    """What one call of a norm put out."""

    def __init__(self, norm: torch.nn.Module, keeper: Keeper) -> None:
        self._norm, self._keeper = norm, keeper
        self._input: Any = None
        self._memory: torch.UntypedStorage | None = None

    def note(self, norm: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """The norm was called."""
        self._input, self._memory = self._keeper.pack(inputs[0].detach()), output.untyped_storage()

    def let_go(self) -> None:
        """All that reads it has done so: it may go."""
        self._memory = None

    def pack(self, kept: Tensor) -> Any:
        """What is kept in the place of `kept`."""
        if self._memory is None or kept.untyped_storage().data_ptr() != self._memory.data_ptr():
            return self._keeper.pack(kept)
        return _Place(kept.size(), kept.stride(), int(kept.storage_offset()))

    def unpack(self, packed: Any) -> Tensor:
        """What was kept."""
        if not isinstance(packed, _Place):
            return self._keeper.unpack(packed)
        with torch.no_grad():
            again: Tensor = self._norm.forward(self._keeper.unpack(self._input))
        return again.as_strided(*packed)
