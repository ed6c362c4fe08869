"""Several models of one shape as one stream of tensors, merged as they are read."""

import itertools
import threading
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_ext.canonical.catalogue import EMBEDDING, OUTPUT
from megatron_ext.checkpoint.streams import TensorSource, TensorSpec
from megatron_ext.errors import ConversionError
from megatron_ext.merging.merge import Merge


class Merged:
    """A source whose tensors are merged from those of others.

    One tensor is merged at a time, whatever the number of threads that ask: it takes several times its own memory.

    Args:
        vocab_size: rows of the embedding and of the output layer that are tokens. The others are padding, merged apart,
            so that a method which keeps a share of a tensor does not keep more of the tokens' for them.
    """

    def __init__(
        self,
        merge: Merge,
        sources: Sequence[TensorSource],
        *,
        vocab_size: int,
        base: TensorSource | None = None,
        seed: int = 0,
    ) -> None:
        self._merge, self._sources, self._base, self._seed = merge, sources, base, seed
        self._vocab_size = vocab_size
        self.specs: Mapping[str, TensorSpec] = (base or sources[0]).specs
        self._one_merges = threading.Lock()

    def read(self, name: str) -> Tensor:
        """One whole merged tensor.

        Raises:
            ConversionError: it is not finite.
        """
        rows = self.specs[name].shape[0]
        padded = name in (EMBEDDING, OUTPUT) and rows > self._vocab_size
        borders = [0, self._vocab_size, rows] if padded else [0, rows]
        with self._one_merges:
            parts = [self._merged(name, slice(*part)) for part in itertools.pairwise(borders)]
            merged = torch.cat(parts) if padded else parts[0]
            if not bool(merged.isfinite().all()):
                raise ConversionError(
                    f"{name}: merged, it holds NaN or Inf; a source does, or the weights of the merge are too large"
                )
            return merged

    def _merged(self, name: str, rows: slice) -> Tensor:
        versions = [partial(_rows, source, name, rows) for source in self._sources]
        base = None if self._base is None else _rows(self._base, name, rows)
        return self._merge.merge(name, versions, base, self._seed)


def _rows(source: TensorSource, name: str, rows: slice) -> Tensor:
    return source.read(name)[rows]
