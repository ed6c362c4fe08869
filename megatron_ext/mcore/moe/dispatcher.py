"""Sorting tokens by expert and back where every expert is on this rank, whole: no communication, two copies."""

#   T tokens of this rank, E experts, H hidden, R rows: one for each token and expert it is sent to, K experts a token

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
    places_TK: Tensor | None
    """Rows of each token, R for one that was dropped; on CUDA."""
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
        self.places_TK = self._places(routing_map_TE, chosen_R) if self._sums_by_gathering(hidden) else None
        self.tokens_per_expert_E = routing_map_TE.sum(dim=0)
        rows_RH: Tensor = _CopyToRows.apply(
            hidden.view(tokens, -1), self.rows_token_R, self.places_TK, self.config.triton_kernels
        )
        return rows_RH, weights_TE.t().reshape(-1).index_select(0, chosen_R)

    def _chosen(self, flat_map: Tensor, tokens: int) -> Tensor:
        """The positions that are true in the flattened [E, T] map."""
        if flat_map.device.type == "cpu" or self.config.moe_expert_capacity_factor is not None:
            return flat_map.nonzero().squeeze(-1)
        # Dropless: the number of rows is known, and the host need not wait for the device to count them.
        return torch.nonzero_static(flat_map, size=tokens * self.config.moe_router_topk).squeeze(-1)

    def _sums_by_gathering(self, hidden: Tensor) -> bool:
        """Whether a token's rows are gathered and summed, or each row added to its token's sum.

        On CUDA rows are added by atomic operations, in another order each time, with a rounding after each.
        """
        return hidden.is_cuda or self.config.triton_kernels

    def _places(self, routing_map_TE: Tensor, chosen_R: Tensor) -> Tensor:
        """The rows [T, K] of each token, by expert."""
        (tokens, _), rows, topk = routing_map_TE.shape, chosen_R.shape[0], self.config.moe_router_topk
        nth_R = routing_map_TE.cumsum(dim=1).t().reshape(-1).index_select(0, chosen_R) - 1
        places = chosen_R.new_full((tokens * topk,), rows)
        places.scatter_(0, self.rows_token_R * topk + nth_R, torch.arange(rows, device=chosen_R.device))
        return places.view(tokens, topk)

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
        combined_TH: Tensor = _SumRows.apply(
            rows_RH, self.rows_token_R, self.places_TK, tokens, self.config.triton_kernels
        )
        return combined_TH.view(self.hidden_shape)


def _sum_rows(rows_RH: Tensor, rows_token_R: Tensor, places_TK: Tensor | None, tokens: int, triton: bool) -> Tensor:
    """Return the sum of each token's rows, [T, H]; by gathering them where their places are known."""
    if places_TK is None or len(rows_RH) == 0:
        return rows_RH.new_zeros(tokens, rows_RH.shape[1]).index_add_(0, rows_token_R, rows_RH)
    if triton:
        from megatron_ext.mcore.kernels.gather_sum import gather_sum

        return gather_sum(rows_RH, places_TK)
    topk = places_TK.shape[1]
    is_dropless = len(rows_RH) == tokens * topk
    places = places_TK if is_dropless else places_TK.clamp(max=len(rows_RH) - 1)
    rows_TKH = rows_RH.index_select(0, places.view(-1)).view(tokens, topk, -1)
    if not is_dropless:
        rows_TKH.masked_fill_((places_TK == len(rows_RH)).unsqueeze(-1), 0.0)
    return rows_TKH.sum(dim=1)


class _CopyToRows(torch.autograd.Function):
    """A copy of its token for each row; autograd of index_select would add the rows' gradients one by one."""

    @staticmethod
    def forward(ctx: Any, tokens_TH: Tensor, rows_token_R: Tensor, places_TK: Tensor | None, triton: bool) -> Tensor:
        ctx.save_for_backward(rows_token_R, places_TK)
        ctx.tokens, ctx.triton = len(tokens_TH), triton
        return tokens_TH.index_select(0, rows_token_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        rows_token_R, places_TK = ctx.saved_tensors
        return _sum_rows(grads[0], rows_token_R, places_TK, ctx.tokens, ctx.triton), None, None, None


class _SumRows(torch.autograd.Function):
    """The sum of each token's rows; autograd of index_add would keep the rows, only to know their shape."""

    @staticmethod
    def forward(
        ctx: Any, rows_RH: Tensor, rows_token_R: Tensor, places_TK: Tensor | None, tokens: int, triton: bool
    ) -> Tensor:
        ctx.save_for_backward(rows_token_R)
        return _sum_rows(rows_RH, rows_token_R, places_TK, tokens, triton)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (rows_token_R,) = ctx.saved_tensors
        return grads[0].index_select(0, rows_token_R), None, None, None, None


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
