"""Core attention by torch's own kernels: grouped-query, causal, within documents, over a context-parallel group.

A layer may have a sliding window, and its heads sinks. No score matrix and no mask of that size stands in memory.
"""

#   S sequence of this CP rank, B micro-batch, N query heads of this TP rank, G key/value heads of this TP rank,
#   D head width

import contextlib
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_ext.mcore.attention_segments import AttentionSegments, attend_segments, find_segments
from megatron_ext.mcore.split_parameters import describe_split, mark_as_split
from megatron_ext.runtime.zigzag import zigzag_restore


class ScaledDotProductAttention(MegatronModule):
    """Causal attention over the heads of one tensor-parallel rank and the queries of one context-parallel rank.

    Documents come as `attention_mask`, the argument that megatron-core hands to the core attention of every layer and
    pipeline stage unread, also under recompute. It is not a mask but the documents' lengths, on the host: kernels must
    know the longest one, and asking a device would wait for it. (`packed_seq_params` would carry them too, but it makes
    multi-latent attention drop the batch dimension.)

    Attributes:
        window: positions that a query of this layer attends to, its own included; None: all before it.
        softmax_offset: the sinks of this rank's heads [N], under megatron-core's name; None without.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        assert (attn_mask_type, attention_type) == (AttnMaskType.causal, "self"), "only causal self-attention is built"
        assert config.kv_channels is not None
        assert pg_collection is not None
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.context_group: dist.ProcessGroup = pg_collection.cp
        self.tensor_group: dist.ProcessGroup = pg_collection.tp
        self.window: int | None = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            self.window = config.window_size[0] + 1
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // self.tensor_group.size()
            where = {"dtype": config.params_dtype, "device": torch.get_default_device()}
            self.softmax_offset = mark_as_split(torch.nn.Parameter(torch.empty(heads, **where)), dim=0)

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
        """Return the context [S, B, N * D]. Under context parallelism S is this rank's two zigzag slices.

        Args:
            attention_mask: None for attention over whole rows, or the lengths of the documents that tokens attend
                within: [B, most documents] of integers in host memory, rows filled up with zeros.
        """
        assert attention_bias is None, "no attention bias here"
        assert packed_seq_params is None, "no packed sequences here"
        segments = self._segments(query_SBND, attention_mask)
        dropout = self.config.attention_dropout if self.training else 0.0
        with self._random_numbers(dropout):
            if segments is None:
                return self._attend_rows(query_SBND, key_SBGD, value_SBGD, dropout)
            key_SBGD, value_SBGD = gather_sequence(key_SBGD, value_SBGD, self.context_group)
            return attend_segments(query_SBND, key_SBGD, value_SBGD, segments, self.scale, dropout, self.softmax_offset)

    def _segments(self, query_SBND: Tensor, document_lengths: Tensor | None) -> AttentionSegments | None:
        """What this rank's queries may see; None where plain attention to all tokens of the row before them does."""
        size = self.context_group.size()
        whole, batch = query_SBND.shape[0] * size, query_SBND.shape[1]
        window = None if self.window is None or self.window >= whole else self.window
        if document_lengths is not None:
            lengths = tuple(tuple(filter(None, row)) for row in document_lengths.tolist())
            assert [sum(row) for row in lengths] == [whole] * batch, "documents must fill their rows"
        elif size > 1 or window is not None or self.softmax_offset is not None:
            lengths = ((whole,),) * batch
        else:
            return None
        return find_segments(lengths, self.context_group.rank(), size, query_SBND.device, window)

    def _attend_rows(self, query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, dropout: float) -> Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        if query.device.type == "cpu" and query.dtype == torch.float32:
            # torch's fp32 CPU kernel is a fifth faster where a head's rows lie together; the copy costs a tenth of it.
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
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

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe the sinks, if there are any, as split over the TP group."""
        return describe_split(self, {"softmax_offset": 0}, self.tensor_group, prefix, sharded_offsets, metadata)


def gather_sequence(key_SBGD: Tensor, value_SBGD: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole sequence, in order, from the zigzag slices of a context-parallel group.

    One all-gather forward and one reduce-scatter backward, as in Llama 3 (arXiv 2407.21783, section 3.3.2): with
    grouped-query attention keys and values are small beside the queries, and one message of a layer's keys and values
    needs no overlap with the computation as a ring does.
    """
    size = group.size()
    if size == 1:
        return key_SBGD, value_SBGD
    widths = [key_SBGD.shape[-1], value_SBGD.shape[-1]]
    both = torch.cat([key_SBGD, value_SBGD], dim=-1)
    whole = zigzag_restore(gather_from_sequence_parallel_region(both, group=group), size)
    key, value = whole.split(widths, dim=-1)
    return key, value
