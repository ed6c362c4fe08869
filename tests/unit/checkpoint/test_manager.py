"""The checkpoint manager with small states of its own, in one process: what it saves, when, and what comes back."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.checkpoint.find import TRACKER_FILE
from megatron_ext.checkpoint.manager import CheckpointManager, RankState
from megatron_ext.checkpoint.shards import TensorShard
from megatron_ext.checkpoint.state_file import STATE_FILE, read_state
from megatron_ext.errors import CheckpointError
from megatron_ext.manifest import MANIFEST_FILE


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Toy:
    """A run with one weight, a position, random numbers, and anything a test adds."""

    def __init__(self, directory: Path, run: dict[str, Any] | None = None) -> None:
        self.weight, self.moment = torch.zeros(3), torch.zeros(3)
        self.position: dict[str, Any] = {"iteration": 0, "consumed_samples": 0, "data": ["abc"]}
        self.steps, self.random = 0, 0
        self.manager = CheckpointManager(
            directory,
            {"parallel": {"tensor_model_parallel_size": 1}} if run is None else run,
            rank_state=RankState(lambda: {"drawn": self.random}, self._restore_random),
        )
        self.manager.register("model", tensors=lambda: [shard("w", self.weight)])
        self.manager.register(
            "optimizer",
            tensors=lambda: [shard("m", self.moment)],
            scalars=lambda: {"optimizer_steps": self.steps},
            restore=self._restore_steps,
        )
        self.manager.register("progress", scalars=lambda: self.position, restore=self._restore_position)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.weight += 1
            self.moment -= 1
            self.steps += 1
            self.random += 7
            self.position = {**self.position, "iteration": self.steps, "consumed_samples": 8 * self.steps}

    def save(self) -> Path:
        return self.manager.save(self.position["iteration"])

    def _restore_random(self, saved: dict[str, Any]) -> None:
        self.random = saved["drawn"]

    def _restore_steps(self, saved: Any) -> None:
        self.steps = saved["optimizer_steps"]

    def _restore_position(self, saved: Any) -> None:
        self.position = dict(saved)


def shard(key: str, data: torch.Tensor) -> TensorShard:
    return TensorShard(key, tuple(data.shape), (0,) * data.dim(), data, is_writer=True)


def register_list(manager: CheckpointManager, log: list[str]) -> None:
    """A new kind of state, such as a hook's."""
    manager.register("log", scalars=lambda: {"log": list(log)}, restore=lambda saved: log.extend(saved.get("log", ())))


def test_everything_that_is_registered_comes_back(tmp_path: Path) -> None:
    toy, log = Toy(tmp_path), ["a", "b"]
    register_list(toy.manager, log)
    toy.train(3)
    checkpoint = toy.save()
    assert json.loads((checkpoint / STATE_FILE).read_text()) == {
        "optimizer_steps": 3,
        "iteration": 3,
        "consumed_samples": 24,
        "data": ["abc"],
        "log": ["a", "b"],
    }
    other, other_log = Toy(tmp_path), list[str]()
    register_list(other.manager, other_log)
    assert other.manager.newest() == checkpoint
    other.manager.restore(checkpoint)
    assert (other.weight.tolist(), other.moment.tolist(), other.steps, other.random) == ([3.0] * 3, [-3.0] * 3, 3, 21)
    assert (other.position, other_log) == (toy.position, log)


def test_only_what_is_named_comes_back(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    toy.train(2)
    checkpoint = toy.save()
    other = Toy(tmp_path)
    other.manager.restore(checkpoint, only=["model", "progress"])
    assert (other.weight.tolist(), other.moment.tolist(), other.steps) == ([2.0] * 3, [0.0] * 3, 0)
    assert other.position["iteration"] == 2


def test_random_numbers_come_back_in_the_same_layout_alone(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    toy.train(2)
    checkpoint = toy.save()
    other = Toy(tmp_path, {"parallel": {"tensor_model_parallel_size": 2}})
    other.manager.restore(checkpoint)
    assert (other.steps, other.random) == (2, 0)


def test_state_that_an_older_checkpoint_lacks_stays_as_it_is(tmp_path: Path) -> None:
    toy, log = Toy(tmp_path), ["new"]
    toy.train(1)
    checkpoint = toy.save()
    register_list(toy.manager, log)
    toy.manager.restore(checkpoint)
    assert log == ["new"]


def test_a_staged_save_looks_complete_to_nobody_and_is_what_it_was_when_staged(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    assert toy.manager.poll()
    toy.train(1)
    toy.manager.stage(1)
    assert not toy.manager.poll()
    assert toy.manager.newest() is None
    with pytest.raises(RuntimeError, match="staged already"):
        toy.manager.stage(1)
    toy.train(1)
    toy.manager.close()
    assert toy.manager.poll()
    assert (tmp_path / TRACKER_FILE).read_text() == "1\n"
    newest = toy.manager.newest()
    assert newest is not None
    assert read_state(newest).consumed_samples == 8
    toy.manager.restore(newest)
    assert toy.weight.tolist() == [1.0] * 3


def test_a_number_that_is_not_finite_leaves_nothing(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    toy.train(1)
    toy.weight[1] = torch.nan
    with pytest.raises(CheckpointError, match="hold NaN or infinity, such as w"):
        toy.save()
    assert toy.manager.poll()
    assert not list(tmp_path.iterdir())


def twice(toy: Toy) -> None:
    toy.manager.register("model")


def same_key(toy: Toy) -> None:
    toy.manager.register("guard", scalars=lambda: {"iteration": 1})


@pytest.mark.parametrize(("register", "message"), [(twice, "registered twice"), (same_key, "iteration")])
def test_two_entries_never_share_a_place(register: Callable[[Toy], None], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        register(Toy(tmp_path))


@pytest.mark.parametrize("damage", [{"optimizer_steps": -1}, {"consumed_samples": "8"}, {"data": "abc"}])
def test_a_state_file_that_says_something_else_is_named(damage: dict[str, Any], tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    toy.train(1)
    checkpoint = toy.save()
    (checkpoint / MANIFEST_FILE).unlink()
    file = checkpoint / STATE_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **damage}))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        toy.manager.restore(checkpoint)
    assert toy.weight.tolist() == [1.0] * 3


def test_tensors_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    toy.train(1)
    checkpoint = toy.save()
    other = Toy(tmp_path)
    other.weight = torch.zeros(4)
    other.manager.register("more", tensors=lambda: [shard("x", torch.zeros(2))])
    with pytest.raises(CheckpointError) as caught:
        other.manager.restore(checkpoint)
    assert "missing: x [2]" in str(caught.value)
    assert "misshapen: w is [3], this run needs [4]" in str(caught.value)
