"""Samples of a plan, read from the token files by position: no index, no cache, nothing that ranks must agree on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_ext.data.stream.packing import Packs
from megatron_ext.data.stream.plan import Place, RunPlan
from megatron_ext.data.stream.position import Consumption, SamplePlace
from megatron_ext.errors import DataError


class TokenFile:
    """The `.bin` of a prepared dataset.

    Args:
        prefix: path of the dataset without `.bin`.
        tokens: how many its manifest says there are.
    """

    def __init__(self, prefix: str | Path, tokens: int) -> None:
        self.path, self.tokens = Path(f"{prefix}.bin"), tokens
        self._stored: np.memmap[Any, Any] | None = None

    def sample(self, place: Place) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Tokens, labels (int64), and which of these count (bool), of the sample at `place`.

        Raises:
            DataError: they are not there.
        """
        ids = self.read(place.start, place.length + 1)
        return ids[:-1], ids[1:], np.ones(place.length, dtype=bool)

    def where(self, place: Place) -> str:
        """Where the sample at `place` stands, for people."""
        return f"tokens {place.start:,} to {place.start + place.length - 1:,} of {self.path}"

    def read(self, start: int, count: int) -> np.ndarray[Any, Any]:
        """`count` tokens from number `start` on, as int64.

        Raises:
            DataError: they are not there.
        """
        stored = self._opened()
        if start + count > len(stored):
            raise DataError(f"{self.path} ends before token {start + count}: it was cut after it was made")
        return stored[start : start + count].astype(np.int64)

    def _opened(self) -> "np.memmap[Any, Any]":
        if self._stored is None:
            try:
                width = self.path.stat().st_size // self.tokens
                self._stored = np.memmap(self.path, dtype=np.uint16 if width == 2 else np.int32, mode="r")
            except (OSError, ValueError) as error:
                raise DataError(f"{self.path}: cannot be read ({error})") from error
        return self._stored

    def __getstate__(self) -> dict[str, Any]:
        # A process that reads ahead maps the file itself.
        return {**self.__dict__, "_stored": None}


class PackedFile(TokenFile):
    """The same, read by packs: their number is that of the unit.

    Args:
        eod: fills up what no piece of a document does.
    """

    def __init__(self, prefix: str | Path, tokens: int, packs: Packs, eod: int) -> None:
        super().__init__(prefix, tokens)
        self._packs, self._eod = packs, eod

    def sample(self, place: Place) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """See `TokenFile.sample`. No loss on what is filled up, nor where nothing follows."""
        tokens = np.full(place.length + 1, self._eod, dtype=np.int64)
        end = 0
        for start, length in self._packs.pieces(place.unit):
            tokens[end : end + length] = self.read(start, length)
            end += length
        counts = np.arange(place.length) < end - 1
        if end == place.length and tokens[end - 1] != self._eod:  # a document that is cut here goes on
            tokens[end] = self.read(start + length, 1)[0]
            counts[-1] = True
        return tokens[:-1], tokens[1:], counts

    def where(self, place: Place) -> str:
        """See `TokenFile.where`."""
        pieces = (f"{start:,} to {start + length - 1:,}" for start, length in self._packs.pieces(place.unit))
        return f"tokens {', '.join(pieces)} of {self.path}"


class PlannedSamples(torch.utils.data.Dataset[dict[str, Any]]):
    """The samples of `plan`, each with the number of its source.

    Args:
        files: of each source that is still to be read, by id.
        vocab_size: token ids are less.
        eod: where its loss is left out, the end-of-document token.
    """

    def __init__(
        self, plan: RunPlan, files: Mapping[str, TokenFile], *, vocab_size: int, eod: int | None = None
    ) -> None:
        self.plan, self._files = plan, files
        self._vocab_size, self._eod = vocab_size, eod
        self.size, self.num_sources = plan.total_samples, len(plan.sources)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> dict[str, Any]:
        place = self.plan.place(position)
        file = self._files[place.source]
        tokens, labels, counts = file.sample(place)
        self.require_known(tokens, file)
        self.require_known(labels, file)
        if self._eod is not None:
            counts = counts & (tokens != self._eod)
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy(counts).float(),
            "source": self.plan.numbers[place.source],
        }

    def counts(self, first: int, last: int) -> list[int]:
        """How many of the samples from `first` to before `last` are read from each source."""
        before, after = self.plan.source_counts(first), self.plan.source_counts(last)
        return [b - a for a, b in zip(before, after, strict=True)]

    def stage(self, position: int) -> int:
        """Number of the stage that the sample at `position` belongs to; behind the last, that of the last."""
        return self.plan.stage_of_sample(min(position, self.size - 1)).number

    def consumption(self, position: int, counts: Sequence[int]) -> Consumption:
        """What the samples before `position` are of each source, and the stage of the last of them; by the plan."""
        stage = None
        if len({stage.name for stage in self.plan.stages}) > 1:
            stage = self.plan.stage_of_sample(max(position - 1, 0)).name
        return Consumption(self.plan.consumed(position), stage)

    def place(self, position: int) -> SamplePlace:
        """Where the sample at `position` comes from."""
        place = self.plan.place(position)
        number = self.plan.source_counts(position)[self.plan.numbers[place.source]]
        return SamplePlace(place.source, number, place.epoch, self._files[place.source].where(place))

    def require_known(self, ids: np.ndarray[Any, Any], file: TokenFile) -> None:
        """Raise DataError where a token id is out of the vocabulary: an embedding or a device would fail on it."""
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= self._vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise DataError(
                f"{file.path}: token id {wrong} is none of the tokenizer's {self._vocab_size}: the file was damaged "
                "after it was made; take it from a copy, or prepare it again"
            )
