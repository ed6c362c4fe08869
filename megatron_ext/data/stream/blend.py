"""Samples of several sources in one fixed order, each with the number of its source."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class Blend(torch.utils.data.Dataset[dict[str, Any]]):
    """`size` samples drawn from `num_sources` sources.

    Args:
        dataset: the samples by position.
        order: the number of the source that each position is read from; None where there is only one.
    """

    def __init__(
        self, dataset: Any, size: int, order: np.ndarray[Any, Any] | None = None, num_sources: int = 1
    ) -> None:
        self.dataset, self.size, self.num_sources = dataset, size, num_sources
        self._order = order

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {**self.dataset[position], "source": self.source(position)}

    def source(self, position: int) -> int:
        """The number of the source that `position` is read from."""
        return 0 if self._order is None else int(self._order[position])

    def stage(self, position: int) -> int:
        """There is one stage."""
        return 0

    def counts(self, first: int, last: int) -> Sequence[int]:
        """How many of the positions from `first` to before `last` are read from each source."""
        if self._order is None:
            return [last - first]
        counted: list[int] = np.bincount(self._order[first:last], minlength=self.num_sources).tolist()
        return counted
