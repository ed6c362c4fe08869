"""megatron-core's transformer layer, whose sum after attention is one step with the norm that follows."""

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_ext.mcore.norm import LayerNorm, RMSNorm, SumBeforeNorm
from megatron_ext.mcore.transformer_config import LayerConfig


class SummedLayer(TransformerLayer):
    """The same modules under the same names; the step is our own kernel's, where the run takes those.

    The sum after the feed-forward network goes to the next layer, whose norm may be on another pipeline stage or be
    recomputed without it.
    """

    def __init__(self, config: LayerConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        norm = self.pre_mlp_layernorm
        if config.triton_kernels and not config.hidden_dropout and isinstance(norm, RMSNorm | LayerNorm):
            self.self_attn_bda = SumBeforeNorm(norm)
