"""Core attention by torch's scaled_dot_product_attention: grouped-query, causal, no score matrix in memory."""

#   S sequence, B micro-batch, N query heads of this TP rank, G key/value heads of this TP rank, D head width

import contextlib
import math
from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class ScaledDotProductAttention(MegatronModule):
    """Causal attention over the heads of one tensor-parallel rank."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        assert (attn_mask_type, attention_type) == (AttnMaskType.causal, "self"), "only causal self-attention is built"
        assert config.kv_channels is not None
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Return the context [S, B, N * D]. The mask is not read: attention is causal over the whole sample."""
        assert attention_bias is None, "no attention bias here"
        assert packed_seq_params is None, "no packed sequences here"
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        dropout = self.config.attention_dropout if self.training else 0.0
        with self._random_numbers(dropout):
            context_BNSD = F.scaled_dot_product_attention(
                query,
                key,
                value,
                dropout_p=dropout,
                is_causal=True,
                scale=self.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        seq, batch = query_SBND.shape[:2]
        return context_BNSD.permute(2, 0, 1, 3).reshape(seq, batch, -1)

    def _random_numbers(self, dropout: float) -> contextlib.AbstractContextManager[Any]:
        """The random numbers that differ between TP ranks, as their heads do.

        Under sequence parallelism megatron-core's block already draws everything from them.
        """
        if dropout == 0.0 or self.config.sequence_parallel:
            return contextlib.nullcontext()
        return get_cuda_rng_tracker().fork()
