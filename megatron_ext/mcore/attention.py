"""Core attention by torch's scaled_dot_product_attention: grouped-query, causal, no score matrix in memory."""

#   S sequence, B micro-batch, N query heads of this TP rank, G key/value heads of this TP rank, D head width

import math
from typing import Any

import torch
import torch.nn.functional as F
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
        if query.device.type == "cpu" and query.dtype == torch.float32:
            # torch's fp32 CPU kernel is a fifth faster where a head's rows lie together; the copy costs a tenth of it.
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        context_BNSD = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        seq, batch = query_SBND.shape[:2]
        return context_BNSD.permute(2, 0, 1, 3).reshape(seq, batch, -1)
