"""Sorting tokens by expert and back where every expert is on this rank, whole: no communication, two copies."""

#   T tokens of this rank, E experts, H hidden, R rows: one for each token and expert it is sent to

import math
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer as CoreMoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

_CORE_ONLY = (
    "moe_shared_expert_overlap",
    "moe_pad_expert_input_to_capacity",
    "moe_router_padding_for_quantization",
    "moe_permute_fusion",
)
"""Options of megatron-core's that only its own dispatchers know; set by overrides, or for Transformer Engine."""


class LocalTokenDispatcher(MoETokenDispatcher):
    """The dispatcher of a layer without expert parallelism (EP = ETP = 1).

    megatron-core's sorts by (rank, expert), communicates, and sorts by (expert, rank); with one rank the second sort
    copies every row into the place where it was, forward and backward, before and after the experts.
    """

    rows_token_R: Tensor
    """Token of each row."""
    tokens_per_expert_E: Tensor
    """Rows of each expert."""
    hidden_shape: torch.Size
    """Shape of the layer's input."""

    def dispatch_preprocess(self, hidden: Tensor, routing_map_TE: Tensor, weights_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows [R, H], sorted by expert and then by token, and their routing weights [R]."""
        self.hidden_shape = hidden.shape
        tokens = routing_map_TE.shape[0]
        chosen_R = self._chosen(routing_map_TE.t().reshape(-1), tokens)
        self.rows_token_R = chosen_R % tokens
        self.tokens_per_expert_E = routing_map_TE.sum(dim=0)
        rows_RH = hidden.view(tokens, -1).index_select(0, self.rows_token_R)
        return rows_RH, weights_TE.t().reshape(-1).index_select(0, chosen_R)

    def _chosen(self, flat_map: Tensor, tokens: int) -> Tensor:
        """The positions that are true in the flattened [E, T] map."""
        if flat_map.device.type == "cpu" or self.config.moe_expert_capacity_factor is not None:
            return flat_map.nonzero().squeeze(-1)
        # Dropless: the number of rows is known, and the host need not wait for the device to count them.
        return torch.nonzero_static(flat_map, size=tokens * self.config.moe_router_topk).squeeze(-1)

    def token_dispatch(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing to send."""
        return rows, weights

    def dispatch_postprocess(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the experts are called with."""
        return rows, self.tokens_per_expert_E, weights

    def combine_preprocess(self, rows: Tensor) -> Tensor:
        """Nothing to sort."""
        return rows

    def token_combine(self, rows: Tensor) -> Tensor:
        """Nothing to send."""
        return rows

    def combine_postprocess(self, rows_RH: Tensor) -> Tensor:
        """Return the sum of each token's rows, in the shape of the layer's input."""
        tokens = math.prod(self.hidden_shape[:-1])
        combined_TH: Tensor = _SumRows.apply(rows_RH, self.rows_token_R, tokens)
        return combined_TH.view(self.hidden_shape)


class _SumRows(torch.autograd.Function):
    """The sum of each token's rows; autograd of index_add would keep the rows, only to know their shape."""

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, rows_token_R: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(rows_token_R)
        return rows_RH.new_zeros(tokens, rows_RH.shape[1]).index_add_(0, rows_token_R, rows_RH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (rows_token_R,) = ctx.saved_tensors
        return grads[0].index_select(0, rows_token_R), None, None


class MoELayer(CoreMoELayer):
    """megatron-core's MoE layer, which sorts its tokens without a detour where it holds all of every expert."""

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        groups = pg_collection or get_default_pg_collection()
        super().__init__(config, *args, pg_collection=groups, **kwargs)
        if groups.ep.size() == groups.expt_tp.size() == 1 and not any(getattr(config, name) for name in _CORE_ONLY):
            self.token_dispatcher = LocalTokenDispatcher(config, groups)
