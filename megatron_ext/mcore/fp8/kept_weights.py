"""Weights in fp8 that are made once a step: when they are, and when they no longer hold."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_ext.checkpoint.shards import TensorShard
from megatron_ext.mcore.fp8.scaling import Scaling


class KeptWeights:
    """The weights of all fp8 layers of this rank, as a `StepParticipant` (mcore/step_state.py).

    Nothing that changes weights (update, loading, a rollback) lies between the beginning of a step and either of its
    ends, and nothing that was made of them outlives it: in validation and while a checkpoint is written their memory is
    free.
    """

    def __init__(self, scalings: Sequence[Scaling]) -> None:
        self._scalings = list(scalings)

    def begin(self) -> None:
        """Keep what is made of the weights from now on; what a step without an end has left goes."""
        for scaling in self._scalings:
            scaling.open_step()

    def commit(self, group: dist.ProcessGroup | None) -> None:
        """The weights have changed."""
        self.discard()

    def discard(self) -> None:
        """The step is over, and the weights may be loaded anew."""
        for scaling in self._scalings:
            scaling.close_step()

    def state(self) -> list[TensorShard]:
        """Nothing: it is all made of the weights."""
        return []


def keeping_scalings(chunks: Sequence[torch.nn.Module]) -> list[Scaling]:
    """Every scaling of `chunks` that keeps its weight, as the run's precision asks."""
    return [
        module
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(module, Scaling) and module.precision.keep_fp8_weights
    ]
