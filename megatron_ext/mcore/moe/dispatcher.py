"""Sorting tokens by expert and back where every expert is on this rank, whole: no communication, two copies."""

#   T tokens of this rank, E experts, H hidden, R rows: one for each token and expert it is sent to, K experts a token
#   C rows of an expert that is filled up to its capacity

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer as CoreMoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.mcore.moe.router import Router

_CORE_ONLY = (
    "moe_shared_expert_overlap",
    "moe_router_padding_for_quantization",
    "moe_permute_fusion",
)
"""Options of megatron-core's that only its own dispatchers know; set by overrides, or for Transformer Engine."""


@dataclass(frozen=True)
class RowMap:
    """Which row is whose token's: copies of tokens, and sums of rows, each the other's derivative."""

    token_R: Tensor
    """Token of each row; T, the number of tokens, for a row of zeros that fills up an expert."""
    places_TK: Tensor | None
    """Rows of each token, R for one that was dropped; None where rows are added to their token's sum one by one."""
    tokens: int
    drops: bool
    """Whether a token may have fewer rows than others."""
    fills: bool
    """Whether a row may have no token."""
    triton: bool
    """Whether sums are our own kernel's."""

    def copies(self, tokens_TH: Tensor) -> Tensor:
        """A copy of its token for each row, [R, H]."""
        return (F.pad(tokens_TH, (0, 0, 0, 1)) if self.fills else tokens_TH).index_select(0, self.token_R)

    def sums(self, rows_RH: Tensor) -> Tensor:
        """The sum of each token's rows, [T, H]; by gathering them where their places are known."""
        if self.places_TK is None or len(rows_RH) == 0:
            return rows_RH.new_zeros(self.tokens, rows_RH.shape[1]).index_add_(0, self.token_R, rows_RH)
        if self.triton:
            from megatron_ext.mcore.kernels.gather_sum import gather_sum

            return gather_sum(rows_RH, self.places_TK)
        places = self.places_TK.clamp(max=len(rows_RH) - 1) if self.drops else self.places_TK
        rows_TKH = rows_RH.index_select(0, places.view(-1)).view(*places.shape, -1)
        if self.drops:
            rows_TKH.masked_fill_((self.places_TK == len(rows_RH)).unsqueeze(-1), 0.0)
        return rows_TKH.sum(dim=1)


class _CopyToRows(torch.autograd.Function):
    """A copy of its token for each row; autograd of index_select would add the rows' gradients one by one."""

    @staticmethod
    def forward(ctx: Any, tokens_TH: Tensor, rows: RowMap) -> Tensor:
        ctx.rows = rows
        return rows.copies(tokens_TH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.sums(grads[0]), None


class _SumRows(torch.autograd.Function):
    """The sum of each token's rows; autograd of index_add would keep the rows, only to know their shape."""

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, rows: RowMap) -> Tensor:
        ctx.rows = rows
        return rows.sums(rows_RH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.copies(grads[0]), None


class LocalTokenDispatcher(MoETokenDispatcher):
    """The dispatcher of a layer without expert parallelism (EP = ETP = 1).

    megatron-core's sorts by (rank, expert), communicates, and sorts by (expert, rank); with one rank the second sort
    copies every row into the place where it was, forward and backward, before and after the experts.
    """

    rows: RowMap
    """Of the tokens that are with the experts."""
    tokens_per_expert_E: Tensor
    """Rows of each expert."""
    hidden_shape: torch.Size
    """Shape of the layer's input."""

    def __init__(self, config: TransformerConfig, groups: ProcessGroupCollection, router: Router) -> None:
        super().__init__(config, groups)
        self.router = router

    def dispatch_preprocess(self, hidden: Tensor, routing_map_TE: Tensor, weights_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows [R, H], sorted by expert and then by token, and their routing weights [R]."""
        self.hidden_shape = hidden.shape
        tokens = routing_map_TE.shape[0]
        chosen_R = self._chosen(routing_map_TE.t().reshape(-1), tokens)
        token_R = chosen_R % tokens
        places_TK = self._places(routing_map_TE, chosen_R, token_R) if self._sums_by_gathering(hidden) else None
        drops = len(chosen_R) < tokens * self.config.moe_router_topk
        self.rows = RowMap(token_R, places_TK, tokens, drops=drops, fills=False, triton=self.config.triton_kernels)
        self.tokens_per_expert_E = routing_map_TE.sum(dim=0)
        rows_RH: Tensor = _CopyToRows.apply(hidden.view(tokens, -1), self.rows)
        return rows_RH, weights_TE.t().reshape(-1).index_select(0, chosen_R)

    def _chosen(self, flat_map: Tensor, tokens: int) -> Tensor:
        """The positions that are true in the flattened [E, T] map."""
        if flat_map.device.type == "cpu" or self.router.drops:
            return flat_map.nonzero().squeeze(-1)
        # Dropless: the number of rows is known, and the host need not wait for the device to count them.
        return torch.nonzero_static(flat_map, size=tokens * self.config.moe_router_topk).squeeze(-1)

    def _sums_by_gathering(self, hidden: Tensor) -> bool:
        """Whether a token's rows are gathered and summed, or each row added to its token's sum.

        On CUDA rows are added by atomic operations, in another order each time, with a rounding after each.
        """
        return hidden.is_cuda or self.config.triton_kernels

    def _places(self, routing_map_TE: Tensor, chosen_R: Tensor, token_R: Tensor) -> Tensor:
        """The rows [T, K] of each token, by expert."""
        (tokens, _), rows, topk = routing_map_TE.shape, chosen_R.shape[0], self.config.moe_router_topk
        nth_R = routing_map_TE.cumsum(dim=1).t().reshape(-1).index_select(0, chosen_R) - 1
        places = chosen_R.new_full((tokens * topk,), rows)
        places.scatter_(0, token_R * topk + nth_R, torch.arange(rows, device=chosen_R.device))
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
        combined_TH: Tensor = _SumRows.apply(rows_RH, self.rows)
        return combined_TH.view(self.hidden_shape)


class PaddedTokenDispatcher(LocalTokenDispatcher):
    """The same where each expert is filled up to its capacity with rows of zeros: no shape depends on the tokens.

    The experts get [E, C, H], C rows each. Nothing is filled up where nothing is dropped: in evaluation.
    """

    def dispatch_preprocess(self, hidden: Tensor, routing_map_TE: Tensor, weights_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows [E C, H], by expert and then by token, and their routing weights [E C]."""
        if not self.router.drops:
            return super().dispatch_preprocess(hidden, routing_map_TE, weights_TE)
        self.hidden_shape = hidden.shape
        tokens, experts = routing_map_TE.shape
        capacity, topk = self.router.rows_an_expert(tokens), self.config.moe_router_topk
        taken_ET = routing_map_TE.t().contiguous().cumsum(dim=1, dtype=torch.int32)
        token_EC = _where_reached(taken_ET, capacity)
        expert_TK = _where_reached(routing_map_TE.cumsum(dim=1, dtype=torch.int32), topk)
        nth_TK = taken_ET.t().gather(1, expert_TK.clamp(max=experts - 1)) - 1
        dropped = experts * capacity
        places_TK = torch.where(expert_TK < experts, expert_TK * capacity + nth_TK, dropped)
        token_R = token_EC.view(-1)
        self.rows = RowMap(token_R, places_TK, tokens, drops=True, fills=True, triton=self.config.triton_kernels)
        self.tokens_per_expert_E = torch.full((experts,), capacity, device=hidden.device)
        rows_RH: Tensor = _CopyToRows.apply(hidden.view(tokens, -1), self.rows)
        return rows_RH, F.pad(weights_TE.t(), (0, 1)).gather(1, token_EC).view(-1)

    def dispatch_postprocess(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the experts are called with."""
        if self.rows.fills:
            by_expert = len(self.tokens_per_expert_E), -1
            rows, weights = rows.view(*by_expert, rows.shape[-1]), weights.view(by_expert)
        return rows, self.tokens_per_expert_E, weights

    def combine_preprocess(self, rows: Tensor) -> Tensor:
        """Return the rows as one list."""
        return rows.view(-1, rows.shape[-1])


def _where_reached(counts: Tensor, most: int) -> Tensor:
    """Where each row of running `counts` reaches 1, 2, ..., `most`; its length where it does not."""
    wanted = torch.arange(1, most + 1, dtype=counts.dtype, device=counts.device)
    return torch.searchsorted(counts, wanted.expand(len(counts), most).contiguous())


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
            pads = config.moe_pad_expert_input_to_capacity
            dispatcher = PaddedTokenDispatcher if pads else LocalTokenDispatcher
            self.token_dispatcher = dispatcher(config, groups, self.router)
