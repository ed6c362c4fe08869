"""Which tokens a rank routes: their positions, and all of a micro-batch's tokens brought together in order."""

#   S sequence, B micro-batch; T tokens of this rank = (S / (TP x CP)) x B, sequence outermost

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.runtime.zigzag import zigzag_restore, zigzag_slice


@dataclass(frozen=True)
class TokenGrid:
    """How a micro-batch's sequences are split over the ranks that share it.

    Context parallelism gives each rank two slices (runtime/zigzag.py), and sequence parallelism splits what a rank
    then has into TP consecutive parts.
    """

    group: dist.ProcessGroup
    """The TP x CP ranks, TP fastest."""
    tp_size: int
    """Parts that sequence parallelism makes; 1 without it."""
    cp_size: int

    @property
    def splits(self) -> int:
        """Ranks with different tokens of the same sequences."""
        return self.tp_size * self.cp_size

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Position in the sequence of each of this rank's `length` rows."""
        return self._mine(torch.arange(length * self.splits, device=device))

    def gather(self, local: Tensor, batch: int) -> Tensor:
        """All ranks' rows of `local` [T, ...], in the order of position and sample."""
        if self.splits == 1:
            return local
        everyone = torch.empty(self.splits * local.shape[0], *local.shape[1:], dtype=local.dtype, device=local.device)
        dist.all_gather_into_tensor(everyone, local.contiguous(), group=self.group)
        return zigzag_restore(everyone.unflatten(0, (-1, batch)), self.cp_size).flatten(0, 1)

    def take(self, everyone: Tensor, batch: int) -> Tensor:
        """This rank's rows of what `gather` returned."""
        return self._mine(everyone.unflatten(0, (-1, batch))).flatten(0, 1)

    def _mine(self, sequence: Tensor) -> Tensor:
        """The rows of a whole sequence that this rank holds."""
        if self.splits == 1:
            return sequence
        cp_rank, tp_rank = divmod(self.group.rank(), self.tp_size)
        return zigzag_slice(sequence, cp_rank, self.cp_size, dim=0).chunk(self.tp_size)[tp_rank]
