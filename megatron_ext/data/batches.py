"""What one forward pass is given."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Token ids, next-token labels and the mask of labels that count: each [B, S]."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """Copy to `device`."""
        return MicroBatch(*(x.to(device, non_blocking=True) for x in (self.tokens, self.labels, self.loss_mask)))

    def pin_memory(self) -> "MicroBatch":
        """Copy to page-locked memory, from which a GPU copies by itself; the DataLoader calls this."""
        return MicroBatch(*(x.pin_memory() for x in (self.tokens, self.labels, self.loss_mask)))

    @property
    def position_ids(self) -> Tensor:
        """Positions [B, S]: each row counts from 0."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device).expand_as(self.tokens)


def sample_indices(
    first_sample: int, dp_rank: int, dp_size: int, micro_batch: int, num_microbatches: int
) -> list[list[int]]:
    """Which samples of a global batch a data-parallel rank takes, one list a micro-batch.

    Micro-batch m of rank r takes the rows (m * dp_size + r) * micro_batch onwards, so that the set of micro-batches
    of a step (and with it every loss computed over a micro-batch) is the same for any number of ranks.
    """
    starts = (first_sample + (m * dp_size + dp_rank) * micro_batch for m in range(num_microbatches))
    return [list(range(start, start + micro_batch)) for start in starts]


def collate(samples: Sequence[dict[str, Tensor]]) -> MicroBatch:
    """Stack samples of a megatron GPTDataset."""
    columns = (
        torch.stack([torch.as_tensor(sample[key]) for sample in samples]) for key in ("tokens", "labels", "loss_mask")
    )
    return MicroBatch(*columns)
