"""Which checkpoints of a run stay."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.checkpoint.find import checkpoint_name, complete_checkpoints, iteration_of
from megatron_ext.checkpoint.metadata import METADATA_FILE
from megatron_ext.checkpoint.retention import Retention, remove_superseded


@pytest.mark.parametrize(
    ("retention", "stay"),
    [
        (Retention(), [0, 10, 20, 30, 40, 50, 60]),
        (Retention(keep_last=1), [50, 60]),
        (Retention(keep_last=3), [40, 50, 60]),
        (Retention(keep_last=2, keep_every=20), [20, 40, 50, 60]),
        (Retention(keep_last=2, keep_matching="[13]0"), [10, 30, 50, 60]),
        (Retention(keep_last=2, keep_matching="0"), [0, 50, 60]),
        (Retention(keep_last=2, keep_initial=True, keep_every=30), [0, 30, 50, 60]),
    ],
)
def test_what_stays(retention: Retention, stay: list[int], tmp_path: Path) -> None:
    for step in range(0, 70, 10):
        (checkpoint := tmp_path / checkpoint_name(step)).mkdir()
        (checkpoint / METADATA_FILE).touch()
        (checkpoint / "__0_0.distcp").touch()
    (tmp_path / "iter_0000020-before-the-spike").mkdir()
    remove_superseded(tmp_path, retention)
    assert [iteration_of(checkpoint) for checkpoint in complete_checkpoints(tmp_path)] == stay
    assert (tmp_path / "iter_0000020-before-the-spike").is_dir()
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_being_copied_stays(tmp_path: Path) -> None:
    for step in range(4):
        (checkpoint := tmp_path / checkpoint_name(step)).mkdir()
        (checkpoint / METADATA_FILE).touch()
        (checkpoint / "__0_0.distcp").touch()
    remove_superseded(tmp_path, Retention(keep_last=2), in_use=[tmp_path / checkpoint_name(0)])
    assert [iteration_of(checkpoint) for checkpoint in complete_checkpoints(tmp_path)] == [0, 2, 3]


@given(st.lists(st.integers(0, 10**7), unique=True).map(sorted), st.integers(1, 9), st.none() | st.integers(1, 50))
def test_the_newest_two_always_stay(steps: list[int], last: int, every: int | None) -> None:
    checkpoints = [Path(checkpoint_name(step)) for step in steps]
    gone = Retention(keep_last=last, keep_every=every).superseded(checkpoints)
    assert not set(gone) & set(checkpoints[-2:])
    assert len(checkpoints) - len(gone) >= min(len(checkpoints), last)
