"""Saves that are written while the run goes on: what they hold, how they end, and what becomes of those that fail."""

import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_ext.checkpoint import host_memory, save
from megatron_ext.checkpoint.finite import NotFiniteError, require_finite
from megatron_ext.checkpoint.manager import CheckpointManager
from megatron_ext.checkpoint.shards import TensorShard
from megatron_ext.checkpoint.state_file import read_scalars
from megatron_ext.checkpoint.torch_dist import TorchDistReader
from megatron_ext.errors import CheckpointError
from tests.support.waiting import wait_until


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(key: str, data: torch.Tensor, *, is_writer: bool = True) -> TensorShard:
    return TensorShard(key, tuple(data.shape), (0,) * data.dim(), data, is_writer=is_writer)


class Toy:
    """A run whose weights are of several types and shapes, one of them not in one piece."""

    def __init__(self, directory: Path) -> None:
        self.weights = {
            "a": torch.arange(3000.0).view(30, 100),
            "b": torch.ones(7, dtype=torch.bfloat16),
            "c": torch.arange(12).view(3, 4).t(),
            "empty": torch.zeros(0, 4),
        }
        self.log = ["begun"]
        self.manager = CheckpointManager(directory, {"parallel": {}}, asynchronous=True)
        self.manager.register("model", tensors=lambda: [shard(key, data) for key, data in self.weights.items()])
        progress = {"iteration": 0, "consumed_samples": 0, "data": [], "optimizer_steps": 0}
        self.manager.register("progress", scalars=lambda: {**progress, "log": self.log})

    def train(self) -> None:
        for weight in self.weights.values():
            weight += 1
        self.log.append("trained")


def assert_holds(checkpoint: Path, weights: dict[str, torch.Tensor]) -> None:
    reader = TorchDistReader(checkpoint)
    assert set(reader.tensors) == set(weights)
    for key, weight in weights.items():
        stored = reader.read(key)
        assert stored.dtype == weight.dtype
        assert torch.equal(stored, weight)


def wait_for(toy: Toy) -> None:
    wait_until(toy.manager.poll)


@contextmanager
def small_files_only() -> Iterator[None]:
    """As on a full disk, no file may become large."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_it_holds_what_was_there_when_it_was_staged(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    before = {key: weight.clone() for key, weight in toy.weights.items()}
    toy.manager.stage(1)
    toy.train()
    wait_for(toy)
    outcome = toy.manager.outcome()
    assert outcome is not None
    assert outcome.error is None
    assert outcome.checkpoint == toy.manager.newest(), "complete, before anybody waited for it"
    assert toy.manager.finish() == outcome.checkpoint
    assert toy.manager.settled() == [outcome]
    assert toy.manager.settled() == []
    assert_holds(outcome.checkpoint, before)
    assert read_scalars(outcome.checkpoint)["log"] == ["begun"]
    assert [path.name for path in outcome.checkpoint.iterdir() if path.name.startswith("__")] == ["__0_0.distcp"]


def test_the_copies_use_the_same_memory_again(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    memory = host_memory.HostMemory()
    shards = [*toy.manager.tensors(), shard("other", torch.ones(2), is_writer=False)]
    first, second = memory.copied(shards), memory.copied(shards)
    assert first is not None
    assert second is not None
    assert [copy.key for copy in first] == list(toy.weights)
    assert [copy.data.data_ptr() for copy in first] == [copy.data.data_ptr() for copy in second]
    # Each has a storage of its own, without which it would be copied once more before it is written.
    assert all(copy.data.untyped_storage().nbytes() == copy.data.numel() * copy.data.itemsize for copy in first)


def test_without_room_for_a_copy_it_is_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(host_memory, "available_memory", lambda: 10**9)
    toy, caplog_at = Toy(tmp_path), logging.WARNING
    caplog.set_level(caplog_at)
    for step in (1, 2):
        before = {key: weight.clone() for key, weight in toy.weights.items()}
        toy.manager.stage(step)
        toy.train()
        assert_holds(toy.manager.finish(), before)
    assert caplog.text.count("checkpoint.async_save: copies of this host's shards take") == 1


def test_one_that_fails_leaves_nothing_and_hinders_no_later_one(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    with small_files_only():
        toy.manager.stage(1)
        wait_for(toy)
    outcome = toy.manager.outcome()
    assert outcome is not None
    assert "rank 0: " in str(outcome.error) or "File too large" in str(outcome.error)
    assert not list(tmp_path.glob("*.partial")), "a full disk needs the room at once"
    settled = toy.manager.settle()
    assert settled is not None
    assert "the checkpoint was not saved:\n  rank 0: " in str(settled.error)
    assert "__0_0.distcp" in str(settled.error)
    toy.manager.stage(2)
    toy.manager.close()
    assert toy.manager.newest() == tmp_path / "iter_0000002"


def test_a_failure_is_raised_by_who_must_have_it_saved(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    with small_files_only(), pytest.raises(CheckpointError, match=r"not saved:\n  rank 0: .*File too large"):
        toy.manager.save(1)
    assert toy.manager.poll()
    assert not list(tmp_path.iterdir())


def test_after_a_failure_of_the_run_it_is_still_completed(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    toy.manager.close_alone()
    toy.manager.stage(1)
    toy.manager.close_alone()
    assert toy.manager.newest() == tmp_path / "iter_0000001"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_numbers_that_are_not_finite_are_found(bad: float, dtype: torch.dtype) -> None:
    good, broken = torch.ones(40), torch.ones(40)
    broken[31] = bad
    shards = [shard("fine", good.to(dtype)), shard("bad", broken.to(dtype)), shard("count", torch.arange(3))]
    require_finite([shards[0], shards[2], shard("copy", broken, is_writer=False)])
    with pytest.raises(NotFiniteError, match="1 tensors hold NaN or infinity, such as bad"):
        require_finite(shards)


def test_large_numbers_are_finite() -> None:
    require_finite([shard("large", torch.full((10,), 3e38)), shard("half", torch.full((10,), 6e4).half())])


def test_nothing_is_staged_where_a_number_is_not_finite(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    toy.weights["b"][3] = torch.nan
    with pytest.raises(NotFiniteError, match="such as b"):
        toy.manager.stage(1)
    assert toy.manager.poll()
    assert not list(tmp_path.iterdir())


def test_a_directory_that_not_every_node_sees_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "_SEEN_WITHIN", 0.0)
    elsewhere = save.Save(tmp_path, save.SmallFiles(1, {}, {}), lambda _: None)
    elsewhere._write([])  # as on a node where what rank 0 made does not show
    error = elsewhere.outcome().error
    assert "iter_0000001.partial, made by rank 0, is not there on" in str(error)
    assert "must be on a file system that every node sees" in str(error)
