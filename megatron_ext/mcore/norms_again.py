"""Norms that are computed again in the backward pass, instead of being kept by what reads them."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

Place = tuple[torch.Size, tuple[int, ...], int]
"""Size, strides and offset of a view."""


@contextlib.contextmanager
def computed_again(norm: torch.nn.Module) -> Iterator[None]:
    """While open, whatever keeps the output of `norm` for its backward pass keeps the norm's input instead.

    That is kept anyway: the norm itself needs it. Each reader computes the norm once more, to the same bits.
    """
    output = _Output(norm)
    noting = norm.register_forward_hook(output.note)
    try:
        with torch.autograd.graph.saved_tensors_hooks(output.pack, output.unpack):
            yield
    finally:
        noting.remove()
        output.let_go()


class _Output:
    """What one call of a norm put out."""

    def __init__(self, norm: torch.nn.Module) -> None:
        self._norm = norm
        self._input: Tensor | None = None
        self._memory: torch.UntypedStorage | None = None

    def note(self, norm: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """The norm was called."""
        self._input, self._memory = inputs[0].detach(), output.untyped_storage()

    def let_go(self) -> None:
        """All that reads it has done so: it may go."""
        self._memory = None

    def pack(self, kept: Tensor) -> Tensor | Place:
        """What is kept in the place of `kept`."""
        if self._memory is None or kept.untyped_storage().data_ptr() != self._memory.data_ptr():
            return kept
        return kept.size(), kept.stride(), int(kept.storage_offset())

    def unpack(self, packed: Tensor | Place) -> Tensor:
        """What was kept."""
        if isinstance(packed, Tensor):
            return packed
        assert self._input is not None
        with torch.no_grad():
            again: Tensor = self._norm.forward(self._input)
        return again.as_strided(*packed)
