"""MXFP4: four-bit floating-point numbers, of which 32 in a row share a scale (OCP Microscaling Formats 1.0, section 5).

gpt-oss is published so: of a weight [..., columns] the numbers stand in pairs in `NAME_blocks` [..., columns / 32, 16],
the first of a pair in the low half of the byte, and the scales in `NAME_scales` [..., columns / 32].
"""

#   C columns, G groups of 32 of them

import torch
from torch import Tensor

GROUP = 32
"""Numbers that share a scale."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the codes 0 to 7 mean; 8 to 15 are their negatives."""
SCALE_BIAS = 127
"""A scale s is 2^(s - 127) (E8M0)."""


def unpacked(blocks: Tensor, scales: Tensor) -> Tensor:
    """The numbers as bf16, which holds each exactly, [..., C].

    Equal to what transformers' `convert_moe_packed_tensors` (integrations/mxfp4.py) computes before it transposes, for
    scales too that no weight has: what 2^127 times 6 leads to is infinite.

    Args:
        blocks: [..., G, 16], uint8.
        scales: [..., G], uint8.
    """
    numbers = torch.tensor((*E2M1, *(-value for value in E2M1)), dtype=torch.bfloat16)
    # A byte at a time: half as many look-ups.
    pairs = torch.stack((numbers.repeat(len(numbers)), numbers.repeat_interleave(len(numbers))), dim=-1)
    unscaled = pairs[blocks.flatten().int()].view(*scales.shape, GROUP)
    return torch.ldexp(unscaled, scales.to(torch.int32).unsqueeze(-1) - SCALE_BIAS).flatten(-2)
