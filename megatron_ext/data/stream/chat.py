"""Packed conversations and pairs: whole samples by best fit, labels within each sample, the weight of every label."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megatron_ext.config import DataConfig, DataSource, TrainConfig
from megatron_ext.config.data import source_ids
from megatron_ext.data.stream.make_plan import SourceSize, make_plan
from megatron_ext.data.stream.packing import Packs, lengths_together, packs_of
from megatron_ext.data.stream.pairs import PackedPairs
from megatron_ext.data.stream.plan import Place, RunPlan
from megatron_ext.data.stream.units import PlannedSamples, TokenFile
from megatron_ext.data.supervised import PIECES, Kind, Supervised, SupervisedSummary, check_supervised
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import DataError

Weighting = Literal["token", "sample", "row"]


class PackedChats(TokenFile):
    """Prepared chat data, read by packs: their number is that of the unit.

    What no sample fills is filled with the tokens of the first one again, without a label: they are routed to experts
    as the data is, and not all to the same.
    """

    def __init__(self, prefix: str | Path, packs: Packs, weighting: Weighting) -> None:
        data = Supervised(prefix)
        super().__init__(prefix, data.num_tokens)
        self._data, self._packs, self._weighting = data, packs, weighting

    def pack(self, place: Place) -> dict[str, Any]:
        """Tokens, labels, the weight of each label, and the lengths of the samples at `place`."""
        pieces = self._packs.pieces(place.unit)
        tokens = np.empty(place.length, dtype=np.int64)
        labels, weights = np.zeros_like(tokens), np.zeros(place.length, dtype=np.float32)
        end = 0
        for start, length in pieces:
            ids, counts, weight = self._data.sample(self._data.number_at(start))
            begin, end = end, end + length
            tokens[begin:end] = ids
            # The label of a token is the one behind it; the last of a sample has none.
            labels[begin : end - 1] = ids[1:]
            weights[begin : end - 1] = self._weigh(counts[1:], weight)
        lengths = [length for _, length in pieces]
        if room := place.length - end:
            tokens[end:] = np.resize(tokens[: lengths[0]], room)
            lengths.append(room)
        return {"tokens": tokens, "labels": labels, "loss_mask": weights, "documents": lengths}

    def _weigh(self, counts: np.ndarray[Any, Any], weight: float) -> np.ndarray[Any, Any]:
        if self._weighting == "row":
            return counts * np.float32(weight)
        if self._weighting == "sample":
            return counts / np.float32(max(counts.sum(), 1))
        return counts.astype(np.float32)

    def where(self, place: Place) -> str:
        """See `TokenFile.where`."""
        numbers = [self._data.number_at(start) for start, _ in self._packs.pieces(place.unit)]
        return f"samples {', '.join(f'{number:,}' for number in numbers)} of {self._data.prefix}"


class ChatSamples(PlannedSamples):
    """The packs of `plan`, each with the number of its source."""

    def __init__(self, plan: RunPlan, files: Mapping[str, PackedChats | PackedPairs], *, vocab_size: int) -> None:
        super().__init__(plan, files, vocab_size=vocab_size)
        self._packed = files

    def __getitem__(self, position: int) -> dict[str, Any]:
        place = self.plan.place(position)
        file = self._packed[place.source]
        pack = file.pack(place)
        self.require_known(pack["tokens"], file)
        columns = {
            name: torch.from_numpy(column) if isinstance(column, np.ndarray) else column
            for name, column in pack.items()
        }
        return {**columns, "source": self.plan.numbers[place.source]}


def chat_size(path: str, tokenizer: Tokenizer, length: int, key: str = "", kind: Kind = "chat") -> SupervisedSummary:
    """Size of the prepared chat data at `path`, which `key` of the configuration names; of pairs `longest` is of both.

    Raises:
        DataError: it is missing, damaged, of another tokenizer or template, or has samples longer than `length`.
    """
    prefix = f"{key}: " if key else ""
    try:
        found = check_supervised(path, tokenizer, kind)
        if kind == "preference":
            found = replace(found, longest=int(lengths_together(path, PIECES[kind]).max()))
    except DataError as error:
        raise DataError(f"{prefix}{error}") from error
    if found.longest > length:
        what, most = (
            ("pair", f"{length // 2} (each answer with its prompt)") if kind == "preference" else ("sample", length)
        )
        raise DataError(
            f"{prefix}{path}: its longest {what} has {found.longest:,} tokens, more than data.sequence_length = "
            f"{length}; prepare it again with --max-tokens {most}, or raise that"
        )
    return found


def chat_samples(plan: RunPlan, paths: Mapping[str, str], tokenizer: Tokenizer, weighting: Weighting) -> ChatSamples:
    """The samples of `plan`.

    Args:
        paths: of each source of the configuration, by id.
    """
    files = {name: PackedChats(paths[name], packs_of(paths[name], plan.unit), weighting) for name in _read(plan)}
    return ChatSamples(plan, files, vocab_size=tokenizer.vocab_size)


def pair_samples(
    plan: RunPlan, paths: Mapping[str, str], tokenizer: Tokenizer, firsts: Mapping[str, int]
) -> ChatSamples:
    """The same of pairs.

    Args:
        firsts: of each path the number of its first pair among all that the run reads.
    """
    files = {
        name: PackedPairs(paths[name], packs_of(paths[name], plan.unit, PIECES["preference"]), firsts[paths[name]])
        for name in _read(plan)
    }
    return ChatSamples(plan, files, vocab_size=tokenizer.vocab_size)


def _read(plan: RunPlan) -> list[str]:
    return [source.id for source in plan.sources if source.tokens is not None]


def validation_plan(
    sources: Sequence[DataSource], data: DataConfig, tokenizer: Tokenizer, kind: Kind, num_samples: int
) -> tuple[RunPlan, dict[str, str]]:
    """`num_samples` packs drawn from `sources` by weight, the same for every run, and the path of each by id."""
    ids, length = source_ids(list(sources), "validation"), data.sequence_length
    sizes = {}
    for number, (name, source) in enumerate(zip(ids, sources, strict=True)):
        chat_size(source.path, tokenizer, length, f"data.validation.{number}.path", kind)
        # As if the packs stood one after the other in a file, and a token behind them.
        sizes[name] = SourceSize(len(packs_of(source.path, length, PIECES[kind])) * length + 1)
    named = [replace(source, id=name) for source, name in zip(sources, ids, strict=True)]
    alone = replace(data, train=named, sources={}, stages=[], unit_tokens=None)
    train = TrainConfig(train_iters=num_samples, global_batch_size=1, seed=0)
    return make_plan(alone, train, sizes), {source.id or "": source.path for source in named}


def chat_validation(
    sources: Sequence[DataSource], data: DataConfig, tokenizer: Tokenizer, weighting: Weighting, num_samples: int
) -> ChatSamples:
    """`num_samples` packs drawn from `sources` by weight, the same for every run."""
    plan, paths = validation_plan(sources, data, tokenizer, "chat", num_samples)
    return chat_samples(plan, paths, tokenizer, weighting)
