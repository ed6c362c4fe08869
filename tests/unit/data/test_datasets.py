"""Samples: a pure function of position, whatever the plan, the ranks or the interruption; blended by weight."""

import dataclasses
import itertools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch

from megatron_ext.config import DataConfig, DataSource
from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.data.stream.batches import DocumentResets, sample_indices
from megatron_ext.data.stream.position import Position
from megatron_ext.data.stream.sources import build_blend
from megatron_ext.data.stream.stream import BatchShape, BlendStream
from megatron_ext.data.tokenizer import Tokenizer, train_tokenizer
from megatron_ext.errors import DataError
from megatron_ext.testing.pool import GlooPool
from tests.support.workspace import write_corpus


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
    return [blend.source(n) for n in range(count)]


def epochs(data: DataConfig) -> tuple[int, list[list[int]]]:
    blend = build_blend(data.train[:1], data, Tokenizer(data.tokenizer), num_samples=1000, seed=7)
    size = blend.dataset.samples_per_epoch
    return size, [torch.as_tensor(blend[n]["tokens"]).tolist() for n in range(3 * size)]


def rank_batches(data: DataConfig, first: int, steps: int, micro_batch: int) -> list[list[list[list[int]]]]:
    import torch.distributed as dist

    blend = build_blend(data.train, data, Tokenizer(data.tokenizer), num_samples=200, seed=7)
    shape = BatchShape(8, micro_batch, dist.get_rank(), dist.get_world_size())
    stream = BlendStream(blend, shape, seed=7, device=torch.device("cpu"))
    stream.seek(Position(first))
    return [[micro.tokens.tolist() for micro in stream.next()] for _ in range(steps)]


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
    resets = DocumentResets(eod, attention=True, positions=True)
    stream = BlendStream(blend, BatchShape(8, 4), seed=7, device=torch.device("cpu"), resets=resets)
    micro_batches = [micro for _ in range(5) for micro in stream.next()]
    return [(micro.tokens.tolist(), micro.document_lengths.tolist()) for micro in micro_batches]


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


def samples_after(data: DataConfig, at: int, happens: Callable[[str], None]) -> list[list[int]] | str:
    """Samples, or the error, where something `happens` to the file that is the `at`th to be saved in the cache."""
    real, saved = numpy.save, itertools.count()

    def save(path: str, array: numpy.ndarray, **options: bool) -> None:
        real(path, array, **options)
        if next(saved) == at:
            happens(path)

    numpy.save = save
    try:
        return samples(data, 50, 0, 50)
    except DataError as error:
        return str(error)
    finally:
        numpy.save = real


def killed(path: str) -> None:
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def full(path: str) -> None:
    os.truncate(path, os.path.getsize(path) // 2)
    raise OSError("3200 requested and 1600 written")  # what numpy says of a full disk


def samples_after_a_kill(data: DataConfig, at: int) -> list[list[int]]:
    if (child := os.fork()) == 0:
        samples_after(data, at, killed)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    return samples(data, 50, 0, 50)


SAVED = 8  # three files for each of two sources, and two for their blend


def read_after_breaks(data: DataConfig) -> None:
    expected = samples(data, 50, 0, 50)
    for at in range(SAVED):
        config = dataclasses.replace(data, cache_dir=f"{data.cache_dir}/killed{at}")
        assert samples_after_a_kill(config, at) == expected
        config = dataclasses.replace(data, cache_dir=f"{data.cache_dir}/full{at}")
        message = samples_after(config, at, full)
        assert isinstance(message, str)
        assert message.startswith(f"data.cache_dir = {config.cache_dir}: no index can be written there")
        assert not list(Path(config.cache_dir).glob("*.partial"))
        assert samples(config, 50, 0, 50) == expected


def test_a_cache_that_was_never_finished_is_built_anew(data: DataConfig, pool: GlooPool, tmp_path: Path) -> None:
    pool.run(1, read_after_breaks, dataclasses.replace(data, cache_dir=str(tmp_path)))


def read_after_damages(data: DataConfig) -> int:
    expected = samples(data, 50, 0, 50)
    files = sorted(path for path in Path(data.cache_dir).rglob("*") if path.is_file())
    for path in files:
        whole = path.read_bytes()
        for damage in (whole[: len(whole) // 2], whole[:-9] + bytes(9), None):
            path.write_bytes(damage or b"")
            if damage is None:
                path.unlink()
            assert samples(data, 50, 0, 50) == expected
            left = sorted(p for p in Path(data.cache_dir).rglob("*") if p.is_file())
            assert left == files
    return len(files)


def test_a_damaged_cache_is_built_anew(data: DataConfig, pool: GlooPool, tmp_path: Path) -> None:
    config = dataclasses.replace(data, cache_dir=str(tmp_path / "cache"))
    assert pool.run(1, read_after_damages, config) == [SAVED + 2 * 3]


def test_ranks_that_do_not_see_the_cache_say_so(data: DataConfig, pool: GlooPool, tmp_path: Path) -> None:
    errors = pool.run(2, cache_of_each_rank, data, str(tmp_path))
    assert errors[0] == ""
    assert errors[1].startswith(f"data.cache_dir = {tmp_path}/1: rank 0 built index-")


def cache_of_each_rank(data: DataConfig, place: str) -> str:
    import torch.distributed as dist

    config = dataclasses.replace(data, cache_dir=f"{place}/{dist.get_rank()}")
    try:
        samples(config, 50, 0, 1)
    except DataError as error:
        return str(error)
    return ""


def message_of_reading(data: DataConfig) -> str:
    try:
        samples(data, 40, 0, 40)
    except DataError as error:
        return str(error)
    return ""


def test_tokens_out_of_the_vocabulary_name_their_source(data: DataConfig, pool: GlooPool, tmp_path: Path) -> None:
    shutil.copytree(Path(data.train[1].path).parent, tmp_path / "d")
    tokens = tmp_path / "d" / "train.bin"
    tokens.write_bytes(b"\xff\xfe" * (tokens.stat().st_size // 2))
    config = dataclasses.replace(data, train=[data.train[0], DataSource(path=str(tmp_path / "d" / "train"))])
    (message,) = pool.run(1, message_of_reading, config)
    assert message.startswith(f"{tokens}: token id 65279 is none of the tokenizer's 330")


def test_a_source_that_cannot_be_used_is_named_by_its_key(data: DataConfig, pool: GlooPool, tmp_path: Path) -> None:
    config = dataclasses.replace(data, train=[data.train[0], DataSource(path=str(tmp_path / "train"))])
    (message,) = pool.run(1, message_of_reading, config)
    assert message.startswith(f"data.train.1.path: {tmp_path}/train: train.bin is missing")
    config = dataclasses.replace(data, sequence_length=10**6)
    (message,) = pool.run(1, message_of_reading, config)
    assert message.startswith("data.train.0.path: ")
    few = "tokens are not one sample of data.sequence_length = 1000000"
    assert message.endswith(f"{few}; lower that, or prepare more text")
