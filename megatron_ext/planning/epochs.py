"""How often a run reads each of its sources."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.config import DataSource

MANY_EPOCHS = 4
"""Up to here repeated data is worth about as much as new data (Muennighoff et al. 2023, arXiv 2305.16264)."""


@dataclass(frozen=True)
class SourceUse:
    """One source of a blend."""

    path: str
    tokens: int
    share: float
    """Of the samples that come from it."""
    epochs: float
    """How often the run reads it."""

    def line(self) -> str:
        """For people."""
        blend = "" if self.share == 1 else f", {100 * self.share:.3g}% of the samples"
        return f"{self.path}: {self.tokens:,} tokens, {self.epochs:,.3g} epochs{blend}"


def source_uses(
    sources: Sequence[DataSource], tokens: Sequence[int], sequence_length: int, samples: int
) -> list[SourceUse]:
    """What becomes of each source in a run of `samples` samples.

    Args:
        tokens: of each source; more than `sequence_length`.
    """
    total = sum(source.weight for source in sources)
    uses = []
    for source, count in zip(sources, tokens, strict=True):
        share = source.weight / total
        # A sample is one token longer than its inputs, and shares that token with the next.
        an_epoch = (count - 1) // sequence_length
        uses.append(SourceUse(source.path, count, share, share * samples / an_epoch))
    return uses
