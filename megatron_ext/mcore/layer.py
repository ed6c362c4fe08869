"""megatron-core's transformer layer, with what ours does beside: sums with norms, norms again, activations moved."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_ext.mcore.norm import LayerNorm, RMSNorm, SumBeforeNorm
from megatron_ext.mcore.norms_again import computed_again
from megatron_ext.mcore.offload import Offload
from megatron_ext.mcore.transformer_config import LayerConfig


@dataclass(frozen=True)
class LayerOffload:
    """A layer's part in what its rank has in the host's memory."""

    of_rank: Offload
    is_first: bool
    """Of its chunk."""
    moves: bool
    """Whether what it keeps goes to the host."""


class SummedLayer(TransformerLayer):
    """The same modules under the same names; the step is our own kernel's, where the run takes those.

    The sum after the feed-forward network goes to the next layer, whose norm may be on another pipeline stage or be
    recomputed without it.

    With `config.recompute_norms` what reads a norm keeps only where its output lay. megatron-core's own way frees the
    memory of the output and fills it again, and needs Transformer Engine (core_guard.py).

    Attributes:
        offload: set where what this layer keeps, or the one before it, goes to the host's memory.
    """

    offload: LayerOffload | None = None

    def __init__(self, config: LayerConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        norm = self.pre_mlp_layernorm
        if config.triton_kernels and not config.hidden_dropout and isinstance(norm, RMSNorm | LayerNorm):
            self.self_attn_bda = SumBeforeNorm(norm)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See TransformerLayer; `hidden_states` is [S, B, H]."""
        part = self.offload
        if part is None or not torch.is_grad_enabled():
            return super().forward(hidden_states, *args, **kwargs)
        with part.of_rank.around(self, hidden_states, is_first=part.is_first, moves=part.moves) as before:
            output, context = super().forward(hidden_states, *args, **kwargs)
        part.of_rank.comes_before(before, output)
        return output, context

    def _forward_attention(self, *args: Any, **kwargs: Any) -> Any:
        with self._again(self.input_layernorm):
            return super()._forward_attention(*args, **kwargs)

    def _forward_mlp(self, *args: Any, **kwargs: Any) -> Any:
        with self._again(self.pre_mlp_layernorm):
            return super()._forward_mlp(*args, **kwargs)

    def _again(self, norm: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        if not self.config.recompute_norms:
            return contextlib.nullcontext()
        return computed_again(norm, self.offload.of_rank.current if self.offload else None)


def offload_layers(chunks: Iterable[Iterable[torch.nn.Module]], config: LayerConfig) -> None:
    """Have what the first layers of each chunk keep, who wait longest for their backward pass, go to the host."""
    of_rank = Offload(config.offload_min_bytes)
    for layers in chunks:
        # One more, whose backward pass is the time for the last of them to come back.
        for number, layer in zip(range(config.offload_layers + 1), layers, strict=False):
            assert isinstance(layer, SummedLayer)
            layer.offload = LayerOffload(of_rank, number == 0, number < config.offload_layers)


def offload_of(chunks: Iterable[torch.nn.Module]) -> Offload | None:
    """What the layers of this rank's chunks have in the host's memory."""
    modules = chain.from_iterable(chunk.modules() for chunk in chunks)
    return next((m.offload.of_rank for m in modules if isinstance(m, SummedLayer) and m.offload), None)
