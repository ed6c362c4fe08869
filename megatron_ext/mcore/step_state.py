"""What moves with the optimizer's steps beside the weights: one protocol for biases, coefficients and fp8 histories."""

from typing import Protocol

import torch.distributed as dist

from megatron_ext.checkpoint.shards import TensorShard


class StepParticipant(Protocol):
    """State of this rank's model chunks that a step moves when it is taken, and leaves alone when it is refused.

    One participant stands for all modules of its kind, so that a step costs one collective a kind and not one a module.
    Every rank has the same participants in the same order, and calls them together.
    """

    def begin(self) -> None:
        """A step begins: what its forward and backward passes gather starts from nothing."""

    def commit(self, group: dist.ProcessGroup) -> None:
        """The step was taken: move by what it gathered, reduced over `group`, the ranks of this pipeline stage."""

    def discard(self) -> None:
        """The step was refused: forget what it gathered."""

    def state(self) -> list[TensorShard]:
        """What a checkpoint holds of it, as views of the live memory; loading fills them in place."""
