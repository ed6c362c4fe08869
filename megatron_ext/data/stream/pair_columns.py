"""What a micro-batch of preference optimisation has beside its tokens: which of them are of which answer."""

#   B samples (packs), S sequence, P the most pairs of a sample of the micro-batch

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_ext.runtime.zigzag import zigzag_slice


@dataclass(frozen=True)
class PairColumns:
    """The pairs of a micro-batch. What is of whole answers is the same on all context-parallel ranks."""

    segments: Tensor
    """[B, S] int64: of each token 2 x the number of its pair within the sample + (0 chosen | 1 rejected)."""
    tokens_BP2: Tensor
    """[B, P, 2] fp32: labels that count of the chosen and the rejected answer; zeros where a sample has fewer pairs."""
    numbers: Tensor
    """[B, P] int64: the number of each pair in the table of reference log-probabilities."""
    reference_BP2: Tensor | None = None
    """[B, P, 2] fp32: log-probabilities of the answers by the reference, where there is one."""

    @property
    def is_pair_BP(self) -> Tensor:
        """[B, P], whether there is a pair at all."""
        chosen_BP: Tensor = self.tokens_BP2[..., 0]
        return chosen_BP > 0

    def sums(self, values_BS: Tensor) -> Tensor:
        """`values_BS` of this rank's tokens, summed over those of each answer in fp32: [B, P, 2]."""
        pairs = self.tokens_BP2.shape[1]
        answers = torch.arange(2 * pairs, device=values_BS.device)
        # No scattered adding, whose order a GPU leaves open.
        is_its = self.segments[:, None, :] == answers[None, :, None]
        sums = torch.where(is_its, values_BS.float()[:, None, :], 0.0).sum(dim=-1)
        return sums.view(-1, pairs, 2)

    def context_share(self, rank: int, size: int) -> "PairColumns":
        """With the tokens that one rank of a context-parallel group computes."""
        return replace(self, segments=zigzag_slice(self.segments, rank, size, dim=1))

    def map(self, change: Callable[[Tensor], Tensor]) -> "PairColumns":
        """With `change` of every tensor."""
        reference = None if self.reference_BP2 is None else change(self.reference_BP2)
        return PairColumns(change(self.segments), change(self.tokens_BP2), change(self.numbers), reference)


def stack_pairs(samples: Sequence[dict[str, Any]]) -> PairColumns:
    """The columns of samples with `segments` [S], `answer_tokens` [pairs, 2] and `pairs` [pairs]."""
    segments = torch.stack([torch.as_tensor(sample["segments"]) for sample in samples])
    tokens, numbers = (
        pad_sequence([torch.as_tensor(sample[key]) for sample in samples], batch_first=True)
        for key in ("answer_tokens", "pairs")
    )
    return PairColumns(segments, tokens.float(), numbers)
