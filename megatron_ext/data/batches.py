"""What one forward pass is given."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.checkpoint.naming import seed_from_name


@dataclass(frozen=True)
class MicroBatch:
    """Token ids, next-token labels and the mask of labels that count: each [B, S]."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    seeds: Tensor
    """[B] int64, seeds what is drawn for a sample (router noise): of the run's seed and the sample's position."""

    def to(self, device: torch.device) -> "MicroBatch":
        """Copy to `device`."""
        return MicroBatch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})

    def pin_memory(self) -> "MicroBatch":
        """Copy to page-locked memory, from which a GPU copies by itself; the DataLoader calls this."""
        return MicroBatch(**{name: tensor.pin_memory() for name, tensor in vars(self).items()})

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


def sample_seed(seed: int, position: int) -> int:
    """The seed of the sample at `position` of a run that is seeded with `seed`."""
    return seed_from_name(seed, f"sample {position}")


def collate(samples: Sequence[dict[str, Tensor]]) -> MicroBatch:
    """Stack samples: those of a megatron GPTDataset with their `seed`."""
    columns = (
        torch.stack([torch.as_tensor(sample[key]) for sample in samples])
        for key in ("tokens", "labels", "loss_mask", "seed")
    )
    return MicroBatch(*columns)
