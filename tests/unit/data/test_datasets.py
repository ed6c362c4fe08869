"""Samples: a pure function of position, whatever the plan, the ranks or the interruption; blended by weight."""

import itertools
from pathlib import Path

import pytest
import torch

from megatron_ext.config import DataConfig, DataSource
from megatron_ext.data.batches import DocumentResets, sample_indices
from megatron_ext.data.datasets import build_blend, read_batches
from megatron_ext.data.preprocess import preprocess
from megatron_ext.data.tokenizer import Tokenizer, train_tokenizer
from megatron_ext.testing.pool import GlooPool
from tests.workspace import write_corpus


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    directory = tmp_path_factory.mktemp("data")
    corpora = [write_corpus(directory / f"{n}.jsonl", documents=60 + 40 * n, seed=n) for n in range(2)]
    train_tokenizer(corpora, directory / "t", 330)
    for corpus in corpora:
        preprocess([corpus], directory / "t", directory / corpus.stem, split=(1, 0, 0))
    return DataConfig(
        sequence_length=32,
        train=[
            DataSource(path=str(directory / "0" / "train"), weight=3.0),
            DataSource(path=str(directory / "1" / "train"), weight=1.0),
        ],
        tokenizer=str(directory / "t"),
        cache_dir=str(directory / "cache"),
    )


def samples(data: DataConfig, planned: int, first: int, count: int) -> list[list[int]]:
    blend = build_blend(data.train, data, Tokenizer(data.tokenizer), num_samples=planned, seed=7)
    return [torch.as_tensor(blend[n]["tokens"]).tolist() for n in range(first, first + count)]


def sources_of(data: DataConfig, count: int) -> list[int]:
    blend = build_blend(data.train, data, Tokenizer(data.tokenizer), num_samples=count, seed=7)
    return [int(n) for n in blend.dataset_index[:count]]


def epochs(data: DataConfig) -> tuple[int, list[list[int]]]:
    blend = build_blend(data.train[:1], data, Tokenizer(data.tokenizer), num_samples=1, seed=7)
    size = blend.samples_per_epoch
    return size, [torch.as_tensor(blend[n]["tokens"]).tolist() for n in range(3 * size)]


def rank_batches(data: DataConfig, first: int, steps: int, micro_batch: int) -> list[list[list[list[int]]]]:
    import torch.distributed as dist

    blend = build_blend(data.train, data, Tokenizer(data.tokenizer), num_samples=200, seed=7)
    stream = read_batches(
        blend,
        seed=7,
        first_sample=first,
        steps=steps,
        global_batch=8,
        micro_batch=micro_batch,
        dp_rank=dist.get_rank(),
        dp_size=dist.get_world_size(),
        num_workers=0,
        device=torch.device("cpu"),
    )
    return [[micro.tokens.tolist() for micro in batch] for batch in stream]


def test_a_longer_plan_does_not_change_what_comes_first(data: DataConfig, pool: GlooPool) -> None:
    (short,) = pool.run(1, samples, data, 100, 0, 100)
    (long,) = pool.run(1, samples, data, 5000, 0, 100)
    assert short == long


def test_sources_come_by_weight_at_every_point(data: DataConfig, pool: GlooPool) -> None:
    (order,) = pool.run(1, sources_of, data, 400)
    for end in (40, 100, 400):
        assert abs(order[:end].count(0) / end - 0.75) < 1 / end + 0.01


def test_every_epoch_has_every_sample_in_another_order(data: DataConfig, pool: GlooPool) -> None:
    ((size, tokens),) = pool.run(1, epochs, data)
    first, second, third = tokens[:size], tokens[size : 2 * size], tokens[2 * size :]
    assert first != second != third
    assert sorted(first) == sorted(second) == sorted(third)


def test_global_batches_are_the_same_for_any_number_of_ranks(data: DataConfig, pool: GlooPool) -> None:
    (alone,) = pool.run(1, rank_batches, data, 16, 3, 2)
    ranks = pool.run(4, rank_batches, data, 16, 3, 2)
    for step in range(3):
        spread = [micro for m in range(len(ranks[0][step])) for rank in ranks for micro in [rank[step][m]]]
        assert spread == alone[step]


def test_reading_on_continues_the_stream(data: DataConfig, pool: GlooPool) -> None:
    (whole,) = pool.run(1, rank_batches, data, 0, 4, 4)
    (rest,) = pool.run(1, rank_batches, data, 16, 2, 4)
    assert whole[2:] == rest


def test_labels_are_the_next_tokens_and_all_count(data: DataConfig, pool: GlooPool) -> None:
    (rows,) = pool.run(1, sample_fields, data)
    for tokens, labels, mask in rows:
        assert tokens[1:] == labels[:-1]
        assert all(m == 1.0 for m in mask)


def sample_fields(data: DataConfig) -> list[tuple[list[int], list[int], list[float]]]:
    blend = build_blend(data.train, data, Tokenizer(data.tokenizer), num_samples=20, seed=7)
    return [
        tuple(torch.as_tensor(blend[n][key]).tolist() for key in ("tokens", "labels", "loss_mask")) for n in range(20)
    ]


def documents_of_batches(data: DataConfig, eod: int) -> list[tuple[list[list[int]], list[list[int]]]]:
    blend = build_blend(data.train, data, Tokenizer(data.tokenizer), num_samples=40, seed=7)
    stream = read_batches(
        blend,
        seed=7,
        first_sample=0,
        steps=5,
        global_batch=8,
        micro_batch=4,
        dp_rank=0,
        dp_size=1,
        num_workers=0,
        device=torch.device("cpu"),
        resets=DocumentResets(eod, attention=True, positions=True),
    )
    return [(micro.tokens.tolist(), micro.document_lengths.tolist()) for batch in stream for micro in batch]


def test_documents_are_found_while_reading(data: DataConfig, pool: GlooPool) -> None:
    eod = Tokenizer(data.tokenizer).eod
    (batches,) = pool.run(1, documents_of_batches, data, eod)
    cuts = 0
    for rows, documents in batches:
        for tokens, lengths in zip(rows, documents, strict=True):
            ends = [end for end in itertools.accumulate(filter(None, lengths)) if end < len(tokens)]
            assert ends == [at + 1 for at, token in enumerate(tokens[:-1]) if token == eod]
            cuts += len(ends)
    assert cuts > 10


def test_new_data_at_the_same_place_gets_a_new_index(tmp_path: Path, data: DataConfig, pool: GlooPool) -> None:
    config = DataConfig(
        sequence_length=32,
        train=[DataSource(path=str(tmp_path / "d" / "train"))],
        tokenizer=data.tokenizer,
        cache_dir=str(tmp_path / "cache"),
    )
    corpus = write_corpus(tmp_path / "c.jsonl", documents=80, seed=3)
    preprocess([corpus], data.tokenizer, tmp_path / "d", split=(1, 0, 0))
    (before,) = pool.run(1, samples, config, 50, 0, 50)
    preprocess(
        [write_corpus(corpus, documents=50, seed=4)], data.tokenizer, tmp_path / "d", split=(1, 0, 0), force=True
    )
    (after,) = pool.run(1, samples, config, 50, 0, 50)
    assert not {tuple(s) for s in before} & {tuple(s) for s in after}


def test_sample_indices_cover_a_global_batch_once() -> None:
    for dp in (1, 2, 4):
        rows = [row for rank in range(dp) for micro in sample_indices(24, rank, dp, 2, 8 // (2 * dp)) for row in micro]
        assert sorted(rows) == list(range(24, 32))
