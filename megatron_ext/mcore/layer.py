"""A transformer layer that may compute its norms again in the backward pass instead of keeping what they put out."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

Place = tuple[torch.Size, tuple[int, ...], int]
"""Size, strides and offset of a view."""


class Layer(TransformerLayer):
    """megatron-core's layer; with `config.recompute_norms` what reads a norm keeps only where its output lay.

    megatron-core's own way frees the memory of the output and fills it again, and needs Transformer Engine
    (core_guard.py).
    """

    def _forward_attention(self, *args: Any, **kwargs: Any) -> Any:
        with self._again(self.input_layernorm):
            return super()._forward_attention(*args, **kwargs)

    def _forward_mlp(self, *args: Any, **kwargs: Any) -> Any:
        with self._again(self.pre_mlp_layernorm):
            return super()._forward_mlp(*args, **kwargs)

    def _again(self, norm: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        return computed_again(norm) if self.config.recompute_norms else contextlib.nullcontext()


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
