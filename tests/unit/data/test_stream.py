"""The stream of batches: what comes next depends on the position alone, and a position knows what it consumed."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.data.stream.blend import Blend, BlendSource
from megatron_ext.data.stream.plan import Consumed
from megatron_ext.data.stream.position import Position, SamplePlace
from megatron_ext.data.stream.stream import BatchShape, BlendStream
from megatron_ext.errors import DataError, MegatronExtError

ORDER = np.array([0, 1, 0, 0, 1, 0, 0, 0] * 3, dtype=np.int16)

SOURCES = [BlendSource("ja", 4, 2, "sample {}".format), BlendSource("en", 8, 2, "sample {}".format)]


class Counting(torch.utils.data.Dataset[dict[str, Any]]):
    """Sample n is the tokens n, n + 1."""

    def __init__(self, happens: Callable[[int], None] = lambda position: None) -> None:
        self.happens = happens

    def __getitem__(self, position: int) -> dict[str, Any]:
        self.happens(position)
        tokens = torch.tensor([position, position + 1])
        return {"tokens": tokens, "labels": tokens + 1, "loss_mask": torch.ones(2)}


def stream(dataset: Counting | None = None, shape: BatchShape | None = None, num_workers: int = 0) -> BlendStream:
    blend = Blend(dataset or Counting(), len(ORDER), SOURCES, ORDER)
    device = torch.device("cpu")
    return BlendStream(blend, shape or BatchShape(4, 2), seed=7, device=device, num_workers=num_workers)


def first_tokens(batch: list[Any]) -> list[int]:
    return [row for micro in batch for row in micro.tokens[:, 0].tolist()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_in_order_and_the_position_is_what_was_given_out(num_workers: int) -> None:
    data = stream(num_workers=num_workers)
    assert data.position() == Position(0, sources=(0, 0))
    assert [first_tokens(data.next()) for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert data.position() == Position(8, sources=(6, 2))
    assert data.consumption().sources == {"ja": Consumed(6, 12, 1.5), "en": Consumed(2, 4, 0.25)}
    assert data.place(9) == SamplePlace("en", 2, 0, "sample 2")
    assert data.place(8) == SamplePlace("ja", 6, 1, "sample 6")
    data.seek(Position(4))
    assert data.position() == Position(4, sources=(3, 1))
    assert data.consumption().sources == {"ja": Consumed(3, 6, 0.75), "en": Consumed(1, 2, 0.125)}
    assert first_tokens(data.next()) == [4, 5, 6, 7]
    data.close()


def test_a_position_that_was_saved_leads_to_the_same_batches() -> None:
    data, other = stream(), stream()
    data.next()
    saved = data.position()
    expected = [first_tokens(data.next()) for _ in range(3)]
    for position in (saved, Position(saved.samples)):  # with its sources, and as old checkpoints have it
        other.seek(position)
        assert [first_tokens(other.next()) for _ in range(3)] == expected


def test_a_position_among_other_sources_is_refused() -> None:
    with pytest.raises(DataError, match=r"\[2, 2\] were read .*, stage 0; .* would have given \[3, 1\], stage 0"):
        stream().seek(Position(4, sources=(2, 2)))
    with pytest.raises(DataError, match=", stage 1;"):
        stream().seek(Position(4, stage=1))
    with pytest.raises(DataError, match="sample 25 is beyond the 24"):
        stream().seek(Position(25))


def test_samples_know_their_source_and_a_seed_of_their_position() -> None:
    data = stream()
    batches = [data.next() for _ in range(2)]
    sources = [source for batch in batches for micro in batch for source in micro.sources.tolist()]
    assert sources == ORDER[:8].tolist()
    seeds = [seed for batch in batches for micro in batch for seed in micro.seeds.tolist()]
    assert len(set(seeds)) == 8
    data.seek(Position(4))
    assert [seed for micro in data.next() for seed in micro.seeds.tolist()] == seeds[4:]


def test_ranks_share_a_global_batch() -> None:
    ranks = [stream(shape=BatchShape(4, 1, rank, 2)) for rank in range(2)]
    assert [first_tokens(data.next()) for data in ranks] == [[0, 2], [1, 3]]
    assert ranks[0].position() == ranks[1].position() == Position(4, sources=(3, 1))


def test_reading_draws_nothing_from_the_numbers_of_dropout() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    data = stream()
    data.next()
    data.seek(Position(0))
    data.next()
    assert torch.equal(before, torch.get_rng_state())


def test_nothing_reads_ahead_once_it_is_closed() -> None:
    before = set(multiprocessing.active_children())
    data = stream(num_workers=1)
    data.next()
    assert len(set(multiprocessing.active_children()) - before) == 1
    data.close()
    assert set(multiprocessing.active_children()) <= before
    assert first_tokens(data.next()) == [4, 5, 6, 7]
    data.close()


def test_beyond_the_end_is_an_error() -> None:
    data = stream()
    data.seek(Position(20))
    data.next()
    with pytest.raises(DataError, match="opened for 24 samples, and sample 27 is wanted"):
        data.next()


def fails_at(position: int) -> None:
    if position == 5:
        raise DataError("train.bin: token id 9")


def test_damaged_samples_can_be_passed_over() -> None:
    data = stream(Counting(fails_at))
    data.next()
    with pytest.raises(DataError, match=r"^train.bin: token id 9$"):
        data.next()
    data.seek(data.position().after(4))
    assert first_tokens(data.next()) == [8, 9, 10, 11]


def dies(position: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("happens", "expected"),
    [
        (fails_at, "^train.bin: token id 9$"),
        (dies, "^a process that reads data ahead ended .*lower data.num_workers"),
    ],
)
def test_faults_of_processes_that_read_ahead_are_one_message(happens: Callable[[int], None], expected: str) -> None:
    before = set(multiprocessing.active_children())
    data = stream(Counting(happens), num_workers=1)
    data.seek(Position(4))
    with pytest.raises(MegatronExtError, match=expected):
        data.next()
    assert set(multiprocessing.active_children()) <= before  # whatever still knows the error
