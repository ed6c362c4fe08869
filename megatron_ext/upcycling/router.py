"""How the routers of an upcycled model start."""

#   E experts, H hidden, R rows: experts that a method always chooses together share one

import math

import torch
from torch import Tensor

from megatron_ext.config import ModelConfig
from megatron_ext.upcycling.methods.base import Draw, Method


def drawn_router(kind: str, std: float, moe: ModelConfig, method: Method, draw: Draw) -> Tensor:
    """A router's weight [E, H] in fp32, drawn with standard deviation `std`.

    Args:
        kind: `normal`, or `uniform` around 0.
    """
    assert moe.num_moe_experts is not None
    rows, generator = moe.num_moe_experts // method.group_size(moe), draw.generator("router.weight")
    weight_RH = torch.empty(rows, moe.hidden_size)
    if kind == "uniform":
        bound = std * math.sqrt(3)
        weight_RH.uniform_(-bound, bound, generator=generator)
    else:
        weight_RH.normal_(0.0, std, generator=generator)
    return repeated(weight_RH, method, moe)


def repeated(weight_RH: Tensor, method: Method, moe: ModelConfig) -> Tensor:
    """Each row for all experts that share it: bit for bit equal, or top-k would tear them apart."""
    return weight_RH.repeat_interleave(method.group_size(moe), dim=0)


def router_from_activations(inputs_TH: Tensor, rows: int, generator: torch.Generator, iterations: int = 20) -> Tensor:
    """Rows [R, H] that send tokens which are alike to the same experts, so that experts start to specialise at once.

    Spherical k-means (Dhillon and Modha 2001, "Concept decompositions for large sparse text data using clustering") of
    the inputs around their mean. A row is its cluster's direction, without what it has of the mean's, scaled so that
    the logits have a standard deviation of 1 over the experts.

    Args:
        inputs_TH: what the dense feed-forward layer sees for each token of some text.
    """
    inputs_TH = inputs_TH.float()
    mean_H = inputs_TH.mean(dim=0)
    directions_TH = torch.nn.functional.normalize(inputs_TH - mean_H, dim=-1)
    centres_RH = directions_TH[_spread_out(directions_TH, rows, generator)]
    for _ in range(iterations):
        nearest_T = (directions_TH @ centres_RH.t()).argmax(dim=1)
        sums_RH = torch.zeros_like(centres_RH).index_add_(0, nearest_T, directions_TH)
        empty = torch.bincount(nearest_T, minlength=rows) == 0
        centres_RH = torch.nn.functional.normalize(torch.where(empty[:, None], centres_RH, sums_RH), dim=-1)
    # What all tokens share would favour the same experts for all of them.
    shared_H = torch.nn.functional.normalize(mean_H, dim=0)
    rows_RH = centres_RH - torch.outer(centres_RH @ shared_H, shared_H)
    logits_TR = inputs_TH @ rows_RH.t()
    return rows_RH / logits_TR.std(dim=1).mean()


def _spread_out(directions_TH: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Indices [R] of tokens that are far from each other (k-means++: chosen by distance from those chosen before)."""
    chosen = [int(torch.randint(len(directions_TH), (1,), generator=generator))]
    distance_T = 1 - directions_TH @ directions_TH[chosen[0]]
    while len(chosen) < rows:
        weights_T = distance_T.clamp_min(0).square()
        nearest = int(torch.multinomial(weights_T + 1e-12, 1, generator=generator))
        chosen.append(nearest)
        distance_T = torch.minimum(distance_T, 1 - directions_TH @ directions_TH[nearest])
    return torch.tensor(chosen)
