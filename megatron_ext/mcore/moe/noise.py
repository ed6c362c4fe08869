"""Random numbers for noisy gating that depend on the token and not on where, when or how often it is routed.

A draw is a hash of (seed of the sample, layer, position, column): no generator has a state, so every parallel layout,
a recomputed layer and a resumed run draw the same numbers.
"""

#   T tokens of this rank, B micro-batch

import torch
from torch import Tensor


def token_keys(seeds_B: Tensor, positions: Tensor, layer: int) -> Tensor:
    """A key for each token in `layer` [T], for `uniform`.

    Args:
        seeds_B: of each sample of the micro-batch (int64).
        positions: [S], of this rank's tokens in the sequence.
    """
    keys = _mix(_mix(seeds_B + layer)[None, :] + positions[:, None])
    return keys.flatten()


def uniform(keys_T: Tensor, columns: int, stream: int = 0) -> Tensor:
    """Numbers from the open interval (0, 1), [T, columns], in fp32. Different `stream`s are independent."""
    column = torch.arange(columns, device=keys_T.device) + (stream << 32)
    bits = _mix(keys_T[:, None] + column * _GOLDEN)
    return ((bits >> 40 & 0xFFFFFF).float() + 0.5) * 2**-24


def gumbel(keys_T: Tensor, columns: int) -> Tensor:
    """Standard Gumbel numbers [T, columns]."""
    return -(-uniform(keys_T, columns).log()).log()


def normal(keys_T: Tensor, columns: int) -> Tensor:
    """Standard normal numbers [T, columns]."""
    return torch.special.ndtri(uniform(keys_T, columns))


# SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", fig. 15), in int64 arithmetic
# that wraps around.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def _mix(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """`x >> bits` without the sign: int64 has an arithmetic shift only."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
