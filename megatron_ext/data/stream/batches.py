"""What one forward pass is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_ext.canonical.seeds import seed_from_name
from megatron_ext.data.stream.pair_columns import PairColumns, stack_pairs
from megatron_ext.runtime.zigzag import zigzag_slice


@dataclass(frozen=True)
class MicroBatch:
    """Token ids, next-token labels, the mask of labels that count, and positions: each [B, S]."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    seeds: Tensor
    """[B] int64, seeds what is drawn for a sample (router noise): of the run's seed and the sample's position."""
    sources: Tensor
    """[B] int64, the number of the source that a sample is from, in the order of the configuration."""
    document_lengths: Tensor | None = None
    """[B, most documents] of each row its documents' lengths over the whole sequence, filled up with zeros; None where
    tokens attend to the whole row. It stays in host memory, where attention reads it without waiting for the device."""
    pairs: PairColumns | None = None
    """Which tokens are of which answer, where answers are compared."""

    def to(self, device: torch.device) -> "MicroBatch":
        """Copy to `device`."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "MicroBatch":
        """Copy to page-locked memory, from which a GPU copies by itself; the DataLoader calls this."""
        return self._map(lambda x: x.pin_memory())

    def context_share(self, rank: int, size: int) -> "MicroBatch":
        """The tokens [B, S / size] that one rank of a context-parallel group computes."""
        share = {name: zigzag_slice(getattr(self, name), rank, size, dim=1) for name in _BY_TOKEN}
        return replace(self, **share, pairs=self.pairs and self.pairs.context_share(rank, size))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        changed = {name: change(getattr(self, name)) for name in (*_BY_TOKEN, "seeds", "sources")}
        return replace(self, **changed, pairs=self.pairs and self.pairs.map(change))


_BY_TOKEN = ("tokens", "labels", "loss_mask", "position_ids")


@dataclass(frozen=True)
class DocumentResets:
    """What starts anew with the token after an end-of-document token."""

    eod: int
    """Id of the end-of-document token."""
    attention: bool
    """Tokens see no token of another document."""
    positions: bool
    """Positions count from 0."""


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


def collate(samples: Sequence[dict[str, Tensor]], resets: DocumentResets | None = None) -> MicroBatch:
    """Stack samples: those of a megatron GPTDataset with their `seed` and `source`.

    Samples may bring the lengths of their `documents`, which are then not looked for, and the `segments` of pairs.
    """
    tokens, labels, loss_mask, seeds, sources = (
        torch.stack([torch.as_tensor(sample[key]) for sample in samples])
        for key in ("tokens", "labels", "loss_mask", "seed", "source")
    )
    if "documents" in samples[0]:
        lengths = [torch.as_tensor(sample["documents"], dtype=torch.int64) for sample in samples]
        positions = torch.stack([torch.cat([torch.arange(int(n)) for n in row]) for row in lengths])
        padded = torch.nn.utils.rnn.pad_sequence(lengths, batch_first=True)
        pairs = stack_pairs(samples) if "segments" in samples[0] else None
        return MicroBatch(tokens, labels, loss_mask, positions, seeds, sources, padded, pairs)
    return complete_columns(tokens, labels, loss_mask, seeds, resets, sources)


def complete_columns(
    tokens: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    seeds: Tensor,
    resets: DocumentResets | None = None,
    sources: Tensor | None = None,
) -> MicroBatch:
    """Complete [B, S] columns and [B] seeds to a micro-batch; without `resets` each row is one document.

    Without `sources` all rows are from the first.

    A document ends with its end-of-document token, the last one of a row where the row ends.
    """
    sources = torch.zeros(len(tokens), dtype=torch.int64) if sources is None else sources
    positions = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
    if resets is None:
        return MicroBatch(tokens, labels, loss_mask, positions, seeds, sources)
    starts_BS = torch.zeros(tokens.shape, dtype=torch.bool)
    starts_BS[:, 1:] = tokens[:, :-1] == resets.eod
    if resets.positions:
        positions = positions - torch.where(starts_BS, positions, 0).cummax(dim=1).values
    if not resets.attention:
        return MicroBatch(tokens, labels, loss_mask, positions, seeds, sources)
    document_BS = starts_BS.cumsum(dim=1)
    lengths = torch.zeros(len(tokens), int(document_BS.max()) + 1, dtype=torch.int64)
    lengths.scatter_add_(1, document_BS, torch.ones_like(document_BS))
    return MicroBatch(tokens, labels, loss_mask, positions, seeds, sources, lengths)
