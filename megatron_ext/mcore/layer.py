"""megatron-core's transformer layer: a sum that is one step with the norm after it, norms that are computed again."""

import contextlib
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_ext.mcore.norm import LayerNorm, RMSNorm, SumBeforeNorm
from megatron_ext.mcore.norms_again import computed_again
from megatron_ext.mcore.transformer_config import LayerConfig


class SummedLayer(TransformerLayer):
    """The same modules under the same names; the step is our own kernel's, where the run takes those.

    The sum after the feed-forward network goes to the next layer, whose norm may be on another pipeline stage or be
    recomputed without it.

    With `config.recompute_norms` what reads a norm keeps only where its output lay. megatron-core's own way frees the
    memory of the output and fills it again, and needs Transformer Engine (core_guard.py).
    """

    def __init__(self, config: LayerConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        norm = self.pre_mlp_layernorm
        if config.triton_kernels and not config.hidden_dropout and isinstance(norm, RMSNorm | LayerNorm):
            self.self_attn_bda = SumBeforeNorm(norm)

    def _forward_attention(self, *args: Any, **kwargs: Any) -> Any:
        with self._again(self.input_layernorm):
            return super()._forward_attention(*args, **kwargs)

    def _forward_mlp(self, *args: Any, **kwargs: Any) -> Any:
        with self._again(self.pre_mlp_layernorm):
            return super()._forward_mlp(*args, **kwargs)

    def _again(self, norm: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        return computed_again(norm) if self.config.recompute_norms else contextlib.nullcontext()
