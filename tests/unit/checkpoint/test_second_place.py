"""Checkpoints at a second place: copied while the run goes on, brought back where they are newer, never half there."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec.implementations.memory
import pytest
import torch
import torch.distributed as dist

from megatron_ext.checkpoint import copier
from megatron_ext.checkpoint.both_places import ahead_of, prepare_directory
from megatron_ext.checkpoint.find import find_checkpoint
from megatron_ext.checkpoint.manager import CheckpointManager
from megatron_ext.checkpoint.metadata import METADATA_FILE
from megatron_ext.checkpoint.retention import Retention
from megatron_ext.checkpoint.run_file import write_run
from megatron_ext.checkpoint.second_place import SecondPlace
from megatron_ext.checkpoint.shards import TensorShard
from megatron_ext.checkpoint.torch_dist import TorchDistReader
from megatron_ext.errors import CheckpointError
from megatron_ext.manifest import MANIFEST_FILE, check_manifest
from tests.support.waiting import HANGS, wait_until


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=["directory", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A second place that is not there yet."""
    if request.param == "directory":
        yield str(tmp_path / "second")
        return
    yield "memory://bucket/second"
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


def managed(directory: Path, url: str | None = None, **settings: Any) -> CheckpointManager:
    place = SecondPlace(url) if url is not None else None
    manager = CheckpointManager(directory, {"parallel": {}}, second_place=place, asynchronous=True, **settings)
    weight = torch.arange(5000.0)
    manager.register("model", tensors=lambda: [TensorShard("w", (5000,), (0,), weight, is_writer=True)])
    counts = {"iteration": 0, "consumed_samples": 0, "data": [], "optimizer_steps": 0}
    manager.register("progress", scalars=lambda: counts)
    return manager


def wait_for(manager: CheckpointManager) -> None:
    wait_until(lambda: not manager.lag())


def test_what_is_copied_comes_back_whole(url: str, tmp_path: Path) -> None:
    manager = managed(tmp_path / "run", url)
    manager.save(4)
    manager.close()
    assert manager.lag() == 0
    [copied] = manager.copied()
    assert (copied.checkpoint.name, copied.error, copied.lag) == ("iter_0000004", None, 0)
    assert SecondPlace(url).complete() == ["iter_0000004"]
    other = tmp_path / "other"
    prepare_directory(other, url)
    assert find_checkpoint(other) == other / "iter_0000004"
    check_manifest(other / "iter_0000004", CheckpointError, checksums=True)
    assert torch.equal(TorchDistReader(other / "iter_0000004").read("w"), torch.arange(5000.0))
    if "://" not in url:
        assert find_checkpoint(url) == Path(url) / "iter_0000004", "every tool reads it there"


def test_the_second_place_keeps_what_the_first_does(url: str, tmp_path: Path) -> None:
    manager = managed(tmp_path / "run", url, retention=Retention(keep_last=2, keep_every=3))
    for step in range(1, 7):
        manager.save(step)
        wait_for(manager)
    manager.close()
    assert [int(name[5:]) for name in SecondPlace(url).complete()] == [3, 5, 6]


def test_a_copy_that_was_left_unfinished_is_made_again(url: str, tmp_path: Path) -> None:
    managed(tmp_path / "run").save(2)
    checkpoint = tmp_path / "run" / "iter_0000002"
    pieces = iter([True, False])
    assert not SecondPlace(url).send(checkpoint, lambda: next(pieces, False))
    assert SecondPlace(url).complete() == []
    fresh = tmp_path / "fresh"
    prepare_directory(fresh, url)
    assert find_checkpoint(fresh) is None
    manager = managed(tmp_path / "run", url)
    manager.close()
    assert SecondPlace(url).complete() == ["iter_0000002"]


def test_a_damaged_checkpoint_is_not_copied(url: str, tmp_path: Path) -> None:
    managed(tmp_path / "run").save(2)
    data = tmp_path / "run" / "iter_0000002" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[9000] ^= 1
    data.write_bytes(content)
    manager = managed(tmp_path / "run", url)
    with pytest.raises(CheckpointError, match=r"(?s)not at its second place.*__0_0\.distcp is not what"):
        manager.close()
    assert SecondPlace(url).complete() == []


def test_a_place_that_fails_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copier, "RETRY", 0.01)
    (tmp_path / "second").touch()
    manager = managed(tmp_path / "run", str(tmp_path / "second"))
    manager.save(2)
    manager.save(3)
    failed: list[Any] = []
    wait_until(lambda: failed.extend(manager.copied()) or failed)
    assert failed[0].error is not None
    assert "checkpoint.copy_to = " in str(failed[0].error)
    assert manager.lag() in (2, 3)
    (tmp_path / "second").unlink()
    wait_for(manager)
    manager.close()
    assert SecondPlace(str(tmp_path / "second")).complete()[-1] == "iter_0000003"


def test_what_is_being_copied_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, go_on = threading.Event(), threading.Event()
    send = SecondPlace.send

    def slowly(self: SecondPlace, checkpoint: Path, goes_on: Any) -> bool:
        reading.set()
        go_on.wait()
        return send(self, checkpoint, goes_on)

    monkeypatch.setattr(SecondPlace, "send", slowly)
    manager = managed(tmp_path / "run", str(tmp_path / "second"), retention=Retention(keep_last=1))
    manager.save(1)
    assert reading.wait(HANGS)
    for step in (2, 3, 4):
        manager.save(step)
    assert manager.lag() == 4
    assert [path.name[-1] for path in sorted((tmp_path / "run").glob("iter_*"))] == ["1", "3", "4"]
    go_on.set()
    manager.close()
    assert SecondPlace(str(tmp_path / "second")).complete() == ["iter_0000001", "iter_0000004"]


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    """A run's directory and its second place, both with the checkpoints of steps 1 and 2."""
    manager = managed(tmp_path / "run", str(tmp_path / "second"))
    for step in (1, 2):
        manager.save(step)
        wait_for(manager)
    manager.close()
    return tmp_path / "run", tmp_path / "second"


def test_the_directory_is_taken_where_it_has_as_much(both: tuple[Path, Path]) -> None:
    run, second = both
    before = os.stat(run / "iter_0000002").st_mtime_ns
    prepare_directory(run, str(second))
    assert os.stat(run / "iter_0000002").st_mtime_ns == before


@pytest.mark.parametrize("missing", [METADATA_FILE, "__0_0.distcp", "run.yaml"])
def test_a_damaged_newest_one_is_replaced_by_its_copy(
    missing: str, both: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    run, second = both
    (run / "iter_0000002" / missing).unlink()
    prepare_directory(run, str(second))
    assert find_checkpoint(run) == run / "iter_0000002"
    assert (run / "iter_0000002" / missing).is_file()
    assert (run / "iter_0000002.damaged").is_dir()
    assert missing.strip("_0.distcp") in caplog.text
    assert "is brought back" in caplog.text


def test_where_both_are_damaged_the_way_to_an_older_one_is_said(both: tuple[Path, Path]) -> None:
    run, second = both
    for place in both:
        os.truncate(place / "iter_0000002" / "__0_0.distcp", 100)
    with pytest.raises(CheckpointError, match="not brought back|not copied") as caught:
        prepare_directory(run, str(second))
    away = f"move {second}/iter_0000002 and {run}/iter_0000002 away"
    assert f"to go on from an older one ({run}/iter_0000001), {away}" in str(caught.value)
    assert (run / "iter_0000002").is_dir()


def test_copies_of_another_run_are_refused(both: tuple[Path, Path], tmp_path: Path) -> None:
    _, second = both
    write_run(second / "iter_0000002", {"checkpoint": {"directory": "runs/first"}})
    assert ahead_of(tmp_path / "elsewhere" / "first", str(second)) is not None  # the same run, moved
    with pytest.raises(CheckpointError, match="holds copies of another run, first: this one, second_run, would go on"):
        prepare_directory(tmp_path / "second_run", str(second))
    assert not (tmp_path / "second_run").exists()
    manager = managed(tmp_path / "second_run", str(second))  # which began when nothing was there yet
    manager.save(3)
    with pytest.raises(CheckpointError, match="holds copies of another run, first"):
        manager.close()
    assert SecondPlace(str(second)).complete()[-1] == "iter_0000002"


def test_a_copy_without_a_manifest_is_none(both: tuple[Path, Path], tmp_path: Path) -> None:
    _, second = both
    (second / "iter_0000002" / MANIFEST_FILE).unlink()
    prepare_directory(tmp_path / "other", str(second))
    assert find_checkpoint(tmp_path / "other") == tmp_path / "other" / "iter_0000001"


def test_a_run_is_not_begun_anew_where_the_second_place_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def isdir(self: object, path: str) -> bool:
        raise OSError("no network")

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "isdir", isdir)
    with pytest.raises(CheckpointError, match=r"(?s)no network.*whether one is there is unknown"):
        prepare_directory(tmp_path / "run", "memory://bucket")
    managed(tmp_path / "run").save(1)
    prepare_directory(tmp_path / "run", "memory://bucket")
    with pytest.raises(CheckpointError, match="cannot be opened: Protocol not known"):  # also later, whatever is here
        prepare_directory(tmp_path / "run", "nothing-opens-this://bucket")


def test_a_run_is_not_begun_anew_where_one_was_being_replaced(tmp_path: Path) -> None:
    managed(tmp_path / "run").save(1)
    (tmp_path / "run" / "iter_0000001").rename(tmp_path / "run" / "iter_0000001.old.partial")
    with pytest.raises(CheckpointError, match=r"has no checkpoint, but iter_0000001\.old\.partial"):
        prepare_directory(tmp_path / "run", None)
