"""RMSNorm over the whole query and the whole key projection (OLMoE, arXiv 2409.02060, section 4.1.3)."""

#   S sequence, B micro-batch, N heads of this TP rank, D head width

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.mcore.group_sums import sum_gradient_over_group, sum_over_group
from megatron_ext.mcore.self_attention import RotatedSelfAttention
from megatron_ext.mcore.split_parameters import describe_split, mark_as_split


class ProjectionNorm(MegatronModule):
    """RMSNorm over all heads of a projection, whose heads (and so the norm's weight) are split over the TP group."""

    def __init__(self, config: TransformerConfig, width: int, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config=config)
        self.width, self.tp_group = width, tp_group
        where = {"dtype": config.params_dtype, "device": torch.get_default_device()}
        self.weight = mark_as_split(torch.nn.Parameter(torch.ones(width // tp_group.size(), **where)), dim=0)

    def forward(self, heads_SBND: Tensor) -> Tensor:
        """Return the heads [S, B, N, D] divided by the root mean square over all heads of all ranks, times weight."""
        x = heads_SBND.flatten(-2).float()
        squares = x.square().sum(dim=-1, keepdim=True)
        # Every rank divides by the sum, so its gradient is summed over the ranks as the sum itself is.
        squares = sum_gradient_over_group(sum_over_group(squares, self.tp_group), self.tp_group)
        normalized = x * torch.rsqrt(squares / self.width + self.config.layernorm_epsilon)
        return (normalized * self.weight.float()).to(heads_SBND.dtype).view(heads_SBND.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe the weight as split over the TP group."""
        return describe_split(self, {"weight": 0}, self.tp_group, prefix, sharded_offsets, metadata)


class ProjectionNormAttention(RotatedSelfAttention):
    """Self-attention with a norm over the whole query and key projection before the rotation."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        groups: ProcessGroupCollection = self.pg_collection
        self.q_layernorm = ProjectionNorm(config, self.query_projection_size, groups.tp)
        self.k_layernorm = ProjectionNorm(config, self.kv_projection_size, groups.tp)
