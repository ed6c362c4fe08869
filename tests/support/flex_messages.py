"""What DeepEP and HybridEP do, in plain all-to-all: a token goes once to each rank that has one of its experts.

megatron-core's flex dispatcher calls the two libraries through four functions of its module. These stand for them on a
CPU, by what their documentation says of arguments and results, so that everything around them is the real thing: the
router, megatron-core's expansion over EP x ETP, its permutation, the experts. They prove nothing of the libraries.
"""

#   T tokens of this rank, H hidden, K experts a token, E experts of the group, L of this rank, R rows received

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor


@dataclass(frozen=True)
class Route:
    """Which rows go where; what the libraries call a handle."""

    tokens: Tensor
    """Token of each row that is sent, by rank."""
    sent: list[int]
    """Rows to each rank."""
    received: list[int]
    """Rows from each rank."""
    count: int
    """Tokens of this rank."""
    group: dist.ProcessGroup
    order: Tensor | None = None
    """HybridEP: the row received that each row of the experts is a copy of."""


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
        return arrived

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _Exchange.apply(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _route(goes_TW: Tensor, group: dist.ProcessGroup) -> Route:
    """The route of tokens that go to the ranks where `goes_TW` is true."""
    _, tokens = goes_TW.t().nonzero(as_tuple=True)
    sent = goes_TW.sum(dim=0)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return Route(tokens, sent.tolist(), received.tolist(), len(goes_TW), group)


def _send(of_tokens: Tensor, route: Route) -> Tensor:
    return _Exchange.apply(of_tokens[route.tokens], route.sent, route.received, route.group)


def _return(rows: Tensor, route: Route) -> Tensor:
    back = _Exchange.apply(rows, route.received, route.sent, route.group)
    return back.new_zeros(route.count, *back.shape[1:]).index_add(0, route.tokens, back)


def deepep_dispatch(
    x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, experts: int, group: dist.ProcessGroup, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Route]:
    """Tokens, their experts here (-1: elsewhere, or none) and weights, rows of each expert, and the handle."""
    local, rank = experts // group.size(), group.rank()
    at_TK = torch.where(experts_TK < 0, -1, experts_TK // local)
    ranks = torch.arange(group.size())
    route = _route((at_TK.unsqueeze(-1) == ranks).any(dim=1), group)
    chosen_RK, weights_RK = _send(experts_TK, route), _send(weights_TK, route)
    is_here = (chosen_RK >= rank * local) & (chosen_RK < (rank + 1) * local)
    here_RK = torch.where(is_here, chosen_RK - rank * local, -1)
    counts_L = (here_RK.unsqueeze(-1) == torch.arange(local)).sum(dim=(0, 1))
    return _send(x_TH, route), here_RK, weights_RK.where(is_here, 0.0), counts_L, route


def deepep_combine(x_RH: Tensor, group: dist.ProcessGroup, route: Route, **_: Any) -> tuple[Tensor, None]:
    """The sum of each token's rows."""
    return _return(x_RH, route), None


def hybridep_dispatch(
    *, x: Tensor, routing_map: Tensor, probs: Tensor, group: dist.ProcessGroup, num_local_experts: int, **_: Any
) -> tuple[Tensor, Tensor, None, Tensor, Route]:
    """Rows sorted by expert, their weights, rows of each expert, and the handle."""
    route = _route(routing_map.unflatten(-1, (group.size(), num_local_experts)).any(dim=-1), group)
    here = slice(group.rank() * num_local_experts, (group.rank() + 1) * num_local_experts)
    map_RL, weights_RL = _send(routing_map, route)[:, here], _send(probs, route)[:, here]
    _, order = map_RL.t().nonzero(as_tuple=True)
    route = Route(route.tokens, route.sent, route.received, route.count, group, order)
    return _send(x, route)[order], weights_RL.t()[map_RL.t()], None, map_RL.sum(dim=0), route


def hybridep_combine(*, x: Tensor, handle: Route, **_: Any) -> Tensor:
    """The sum of each token's rows."""
    assert handle.order is not None
    received = x.new_zeros(sum(handle.received), x.shape[-1]).index_add(0, handle.order, x)
    return _return(received, handle)


@contextlib.contextmanager
def flex_messages() -> Iterator[None]:
    """While open, megatron-core's flex dispatcher finds both libraries."""
    with mock.patch.multiple(
        token_dispatcher,
        fused_dispatch=deepep_dispatch,
        fused_combine=deepep_combine,
        set_deepep_num_sms=lambda _: None,
        hybrid_ep_dispatch=hybridep_dispatch,
        hybrid_ep_combine=hybridep_combine,
    ):
        yield
