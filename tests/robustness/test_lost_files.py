"""A checkpoint that has lost files is an error with a way out: never a new run, never silently an older checkpoint."""

import shutil
from pathlib import Path

import pytest

from megatron_ext.checkpoint.find import TRACKER_FILE, find_checkpoint, require_checkpoint
from megatron_ext.checkpoint.metadata import METADATA_FILE
from megatron_ext.checkpoint.publish import in_the_way
from megatron_ext.errors import CheckpointError
from megatron_ext.merging.average import sources_of
from megatron_ext.merging.options import AverageOptions
from megatron_ext.model_io.open import open_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A directory with checkpoints of steps 2 and 4, as far as finding them goes."""
    for step in (2, 4):
        checkpoint = tmp_path / "run" / f"iter_{step:07d}"
        checkpoint.mkdir(parents=True)
        for name in (METADATA_FILE, "__0_0.distcp"):
            (checkpoint / name).touch()
    (tmp_path / "run" / TRACKER_FILE).write_text("4\n")
    return tmp_path / "run"


def newest(run: Path) -> Path:
    return run / "iter_0000004"


def test_without_faults_the_newest_is_found(run: Path, tmp_path: Path) -> None:
    assert find_checkpoint(run) == find_checkpoint(newest(run)) == newest(run)
    assert find_checkpoint(tmp_path / "nothing") is None
    # What a killed save leaves is no checkpoint and no obstacle.
    (tmp_path / "first" / "iter_0000002.partial").mkdir(parents=True)
    assert find_checkpoint(tmp_path / "first") is None


@pytest.mark.parametrize("name", [METADATA_FILE, "__0_0.distcp"])
def test_a_damaged_newest_one_is_named_with_the_way_out(name: str, run: Path) -> None:
    (newest(run) / name).unlink()
    for find in (find_checkpoint, require_checkpoint, open_checkpoint):
        with pytest.raises(CheckpointError, match="iter_0000004 is not complete: ") as refusal:
            find(run)
        assert "To go on from iter_0000002 instead, move iter_0000004 away" in str(refusal.value)
    if name == METADATA_FILE:
        assert "`cp DIR/*`" in str(refusal.value)
        with pytest.raises(CheckpointError, match=r"\.metadata is missing"):
            find_checkpoint(newest(run))


def test_the_one_before_is_taken_once_the_damaged_one_is_moved_and_it_is_said(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(newest(run))
    assert find_checkpoint(run) == run / "iter_0000002"
    assert "says 4, but the newest checkpoint is iter_0000002" in caplog.text


def test_an_average_of_the_last_ones_passes_over_none(run: Path) -> None:
    assert sources_of(AverageOptions(sources=[str(run)], target="target", last=2)) == sorted(run.glob("iter_*"))
    (run / "iter_0000002" / METADATA_FILE).unlink()
    with pytest.raises(CheckpointError, match="iter_0000002 is not complete.*move it away to do without it"):
        sources_of(AverageOptions(sources=[str(run)], target="target", last=2))


def test_no_complete_one_at_all_is_no_new_run(run: Path) -> None:
    for checkpoint in run.glob("iter_*"):
        (checkpoint / METADATA_FILE).unlink()
    with pytest.raises(CheckpointError, match="iter_0000004 is not complete.*There is no complete one before it"):
        find_checkpoint(run)
    for checkpoint in run.glob("iter_*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(CheckpointError, match=f"{TRACKER_FILE} says 4, but no checkpoint is here"):
        find_checkpoint(run)


def test_what_is_in_the_way_of_a_save_is_found_before_the_run(run: Path, tmp_path: Path) -> None:
    (run / "iter_0000009.partial").symlink_to(tmp_path)
    (run / "iter_0000010.partial").mkdir()
    (run / "iter_0000010.partial" / "notes.txt").touch()
    shutil.copytree(newest(run), run / "iter_0000011.partial")
    assert [path.name for path in in_the_way(run)] == ["iter_0000009.partial", "iter_0000010.partial"]
