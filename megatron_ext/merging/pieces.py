"""Large tensors in pieces that stay in the processor's cache, in whatever dtype they are computed.

A step over the whole would be written to memory and read again by the next, in a dtype wider than the tensor's.
"""

import torch
from torch import Tensor

PIECE = 1 << 16
"""Elements of a piece. What is drawn at random by pieces depends on it."""


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Flat views of the elements in order; the tensor must be contiguous."""
    return torch.split(tensor.view(-1), PIECE)
