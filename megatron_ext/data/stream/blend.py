"""Samples of several sources in one fixed order, each with the number of its source."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_ext.data.stream.plan import Consumed
from megatron_ext.data.stream.position import Consumption, SamplePlace


@dataclass(frozen=True)
class BlendSource:
    """One source of a blend."""

    id: str
    samples_an_epoch: int
    tokens_a_sample: int
    where: Callable[[int], str]
    """Where in its files a sample of it stands, counted over all epochs; for people."""


class Blend(torch.utils.data.Dataset[dict[str, Any]]):
    """`size` samples drawn from several sources.

    Args:
        dataset: the samples by position.
        sources: in the order of their numbers.
        order: the number of the source that each position is read from; None where there is only one.
    """

    def __init__(
        self, dataset: Any, size: int, sources: Sequence[BlendSource], order: np.ndarray[Any, Any] | None = None
    ) -> None:
        self.dataset, self.size, self.sources = dataset, size, tuple(sources)
        self.num_sources = len(self.sources)
        self._order = order

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {**self.dataset[position], "source": self.source(position)}

    def source(self, position: int) -> int:
        """The number of the source that `position` is read from."""
        return 0 if self._order is None else int(self._order[position])

    def consumption(self, position: int, counts: Sequence[int]) -> Consumption:
        """What the samples before `position`, of which `counts` says how many each source has, are of each source."""
        read = zip(self.sources, counts, strict=True)
        return Consumption(
            {s.id: Consumed(count, count * s.tokens_a_sample, count / s.samples_an_epoch) for s, count in read}
        )

    def place(self, position: int) -> SamplePlace:
        """Where the sample at `position` comes from."""
        source = self.source(position)
        described, number = self.sources[source], self.counts(0, position)[source]
        return SamplePlace(described.id, number, number // described.samples_an_epoch, described.where(number))

    def stage(self, position: int) -> int:
        """There is one stage."""
        return 0

    def counts(self, first: int, last: int) -> Sequence[int]:
        """How many of the positions from `first` to before `last` are read from each source."""
        if self._order is None:
            return [last - first]
        counted: list[int] = np.bincount(self._order[first:last], minlength=self.num_sources).tolist()
        return counted
