"""Which tokens a rank routes: their positions, and all of a micro-batch's tokens brought together in order."""

#   S sequence, B micro-batch; T tokens of this rank = (S / (TP x CP)) x B, sequence outermost

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TokenGrid:
    """How a micro-batch's sequences are split over the ranks that share it.

    Context parallelism gives each rank the slices r and 2 CP - 1 - r of 2 CP (megatron's zigzag); sequence parallelism
    splits what a rank has into TP consecutive parts.
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
        return self._positions_of(self.group.rank() if self.splits > 1 else 0, length, device)

    def _positions_of(self, rank: int, length: int, device: torch.device) -> Tensor:
        cp_rank, tp_rank = divmod(rank, self.tp_size)
        held = length * self.tp_size  # rows of this CP rank
        row = torch.arange(tp_rank * length, (tp_rank + 1) * length, device=device)
        if self.cp_size == 1:
            return row
        half = held // 2
        early, late = cp_rank * half, (2 * self.cp_size - 1 - cp_rank) * half
        return torch.where(row < half, early + row, late + row - half)

    def gather(self, local: Tensor, batch: int) -> Tensor:
        """All ranks' rows of `local` [T, ...], in the order of position and sample."""
        if self.splits == 1:
            return local
        everyone = torch.empty(self.splits * local.shape[0], *local.shape[1:], dtype=local.dtype, device=local.device)
        dist.all_gather_into_tensor(everyone, local.contiguous(), group=self.group)
        return everyone[self._order(local.shape[0] // batch, batch, local.device)]

    def take(self, everyone: Tensor, batch: int) -> Tensor:
        """This rank's rows of what `gather` returned."""
        if self.splits == 1:
            return everyone
        length = everyone.shape[0] // batch // self.splits
        return everyone.unflatten(0, (-1, batch))[self.positions(length, everyone.device)].flatten(0, 1)

    def _order(self, length: int, batch: int, device: torch.device) -> Tensor:
        positions = torch.cat([self._positions_of(rank, length, device) for rank in range(self.splits)])
        rows = positions.argsort()
        return (rows[:, None] * batch + torch.arange(batch, device=device)).flatten()
