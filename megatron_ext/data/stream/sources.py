"""Training samples out of prepared datasets: megatron-core's GPTDataset, for any number of epochs, blended by weight.

Which sample stands at position n is a pure function of the configuration and n. It does not depend on how long the run
is planned, on the number of ranks or on where a run was interrupted, so resuming means going on at n.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_ext.config import DataConfig, DataSource, TrainConfig
from megatron_ext.config.data import source_ids
from megatron_ext.data.dataset import SplitSummary, check_dataset
from megatron_ext.data.stream.blend import Blend, BlendSource
from megatron_ext.data.stream.index_cache import with_index
from megatron_ext.data.stream.make_plan import SourceSize, make_plan
from megatron_ext.data.stream.packing import packs_of
from megatron_ext.data.stream.plan import RunPlan
from megatron_ext.data.stream.stream import Samples
from megatron_ext.data.stream.units import PackedFile, PlannedSamples, TokenFile
from megatron_ext.data.supervised import require_kind
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import DataError

_UNLIMITED = 2**62


class _Vocabulary:
    """What GPTDataset asks of a tokenizer. It has no padding token: samples are full."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocab_size, self.eod = tokenizer.vocab_size, tokenizer.eod
        self.unique_identifiers = {"tokenizer": tokenizer.fingerprint}


class EpochedSource(torch.utils.data.Dataset[dict[str, Any]]):
    """One prepared dataset read over and over, every epoch in another order.

    The first epoch has GPTDataset's order. Epoch e > 0 permutes its samples by a generator seeded with
    (seed, e), so position n never depends on how many epochs there will be.
    """

    index_split = Split.train

    def __init__(self, dataset: GPTDataset, seed: int, identity: dict[str, Any]) -> None:
        self.dataset, self.seed, self.identity = dataset, seed, identity
        self.samples_per_epoch = len(dataset)
        self.unique_identifiers = {"class": type(self).__name__, "source": dataset.unique_identifiers}
        self._epoch, self._order = 0, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return _UNLIMITED

    def __getitem__(self, position: int) -> dict[str, Any]:
        sample: dict[str, Any] = self.dataset[self._index(position)]
        self._require_known_tokens(sample)
        return sample

    def where(self, position: int) -> str:
        """The documents, and the first and last of their tokens, that the sample at `position` is made of."""
        dataset, index = self.dataset, self._index(position)
        dataset[index]  # which maps the indices
        at = dataset.shuffle_index[index]
        (first, begin), (last, end) = dataset.sample_index[at], dataset.sample_index[at + 1]
        if first == last:
            return f"document {dataset.document_index[first]}, tokens {begin} to {end - 1}"
        documents = [f"document {dataset.document_index[first]} from token {begin}"]
        documents += [f"document {dataset.document_index[n]}" for n in range(first + 1, last)]
        if end:
            documents.append(f"document {dataset.document_index[last]} before token {end}")
        return ", ".join(documents)

    def _index(self, position: int) -> int:
        """What `position` is in the first epoch's order."""
        epoch, within = divmod(int(position), self.samples_per_epoch)
        if epoch and epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.samples_per_epoch)
        return int(self._order[within]) if epoch else within

    def _require_known_tokens(self, sample: dict[str, Any]) -> None:
        """Raise DataError where a token id is out of the vocabulary: an embedding or a device would fail on it."""
        size = self.dataset.config.tokenizer.vocab_size
        for ids in (sample["tokens"], sample["labels"]):
            lowest, highest = (int(x) for x in torch.aminmax(ids))
            if lowest < 0 or highest >= size:
                wrong = lowest if lowest < 0 else highest
                raise DataError(
                    f"{self.dataset.dataset_path}.bin: token id {wrong} is none of the tokenizer's {size}: the file "
                    "was damaged after it was made; take it from a copy, or prepare it again"
                )


def build_blend(
    sources: Sequence[DataSource], data: DataConfig, tokenizer: Tokenizer, *, num_samples: int, seed: int
) -> Samples:
    """Return `num_samples` samples drawn from `sources` by weight.

    With `data.cache_dir`, indices are built by rank 0, whose turn comes first, and read by the others from there.

    Raises:
        DataError: a source is missing, damaged, too short or was made with another tokenizer.
    """
    section = "validation" if sources is data.validation else "train"
    sizes = []
    for number, source in enumerate(sources):
        key = f"data.{section}.{number}.path"
        sizes.append(counts := source_size(source.path, tokenizer, key))
        if counts.tokens <= data.sequence_length:
            few = f"{counts.tokens} tokens are not one sample of data.sequence_length = {data.sequence_length}"
            raise DataError(f"{key}: {source.path}: {few}; lower that, or prepare more text")
    if data.cache_dir is None:
        return _computed_blend(sources, sizes, data, tokenizer, num_samples, seed)
    return _blend(sources, data, tokenizer, num_samples, seed, section)


def source_size(path: str, tokenizer: Tokenizer, key: str) -> SplitSummary:
    """Size of the prepared dataset at `path`, which `key` of the configuration names.

    Raises:
        DataError: it is missing, damaged, was made with another tokenizer, or is no text.
    """
    try:
        size = check_dataset(path, tokenizer)
        require_kind(path, "text", "task.kind = pretrain")
        return size
    except DataError as error:
        raise DataError(f"{key}: {error}") from error


def planned_samples(
    plan: RunPlan, paths: Mapping[str, str], data: DataConfig, tokenizer: Tokenizer, *, packed: bool = False
) -> PlannedSamples:
    """The samples of `plan`, in order 2.

    Args:
        paths: of each source of the configuration, by id.
        packed: the units of the plan are packs of documents.
    """
    read = {s.id: s.tokens for s in plan.sources if s.tokens is not None}
    if packed:
        files: dict[str, TokenFile] = {
            name: PackedFile(paths[name], source_size(paths[name], tokenizer, name).tokens, packs, tokenizer.eod)
            for name in read
            if (packs := packs_of(paths[name], plan.unit))
        }
    else:
        files = {name: TokenFile(paths[name], tokens) for name, tokens in read.items()}
    eod = tokenizer.eod if data.eod_mask_loss else None
    return PlannedSamples(plan, files, vocab_size=tokenizer.vocab_size, eod=eod)


def _computed_blend(
    sources: Sequence[DataSource],
    sizes: Sequence[SplitSummary],
    data: DataConfig,
    tokenizer: Tokenizer,
    num_samples: int,
    seed: int,
) -> Samples:
    """The blend in order 2: one stage of single samples, of those of `data` alone."""
    ids = source_ids(list(sources), "validation" if sources is data.validation else "train")
    named = [replace(source, id=name) for source, name in zip(sources, ids, strict=True)]
    alone = replace(data, train=named, sources={}, stages=[], unit_tokens=None)
    train = TrainConfig(train_iters=num_samples, global_batch_size=1, seed=seed)
    plan = make_plan(alone, train, {name: SourceSize(size.tokens) for name, size in zip(ids, sizes, strict=True)})
    return planned_samples(plan, {source.id or "": source.path for source in named}, data, tokenizer)


def _blend(
    sources: Sequence[DataSource], data: DataConfig, tokenizer: Tokenizer, num_samples: int, seed: int, split: str
) -> Blend:
    parts = [_source(source.path, data, tokenizer, seed + number) for number, source in enumerate(sources)]
    described = [
        BlendSource(name, part.samples_per_epoch, data.sequence_length, part.where)
        for name, part in zip(source_ids(list(sources), split), parts, strict=True)
    ]
    if len(parts) == 1:
        return Blend(parts[0], num_samples, described)
    weights = [float(source.weight) for source in sources]
    identity = {"sources": [part.identity for part in parts], "weights": weights, "samples": num_samples}

    def make(folder: str) -> BlendedDataset:
        config = copy.copy(parts[0].dataset.config)
        config.path_to_cache = folder
        return BlendedDataset(parts, weights, num_samples, config)

    blended = with_index(_cache(data), identity, make)
    return Blend(blended, num_samples, described, blended.dataset_index)


def _source(path: str, data: DataConfig, tokenizer: Tokenizer, seed: int) -> EpochedSource:
    tokens = Path(f"{path}.bin").stat()
    identity = {
        "path": path,
        "bytes": tokens.st_size,
        "modified": tokens.st_mtime_ns,
        "tokenizer": tokenizer.fingerprint,
        "sequence_length": data.sequence_length,
        "seed": seed,
    }
    indexed = IndexedDataset(path, multimodal=False, mmap=True)
    documents = np.arange(indexed.sequence_lengths.shape[0], dtype=np.int32)

    def make(folder: str) -> GPTDataset:
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=data.sequence_length,
            blend=([path], None),
            split="1,0,0",
            path_to_cache=folder,
            tokenizer=_Vocabulary(tokenizer),
            # Documents are found when samples are collated: GPTDataset would only tell them as a mask [S, S].
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=data.eod_mask_loss,
            create_attention_mask=False,
        )
        return GPTDataset(indexed, path, documents, None, Split.train, config)

    return EpochedSource(with_index(_cache(data), identity, make), seed, identity)


def _cache(data: DataConfig) -> Path:
    if data.cache_dir is None:
        raise ValueError("without data.cache_dir there are no indices")
    return Path(data.cache_dir)
