"""What FP8 layers with delayed scaling remember (amax histories, scales), as checkpoints are given it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ScalingState:
    """What an FP8 linear layer with delayed scaling remembers, as live tensors; its `get_extra_state` returns it."""

    tensors: dict[str, Tensor]
