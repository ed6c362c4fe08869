"""The run in a checkpoint, where people have changed it by hand."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint.run_file import read_run, write_run
from megatron_ext.errors import CheckpointError


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"data": "x"}, "data = 'x', where a section of keys belongs"),
        ({"train": [3]}, "train = .3., where a section"),
        ({"parallel": 3}, "parallel = 3, where a section"),
        ({"data": {"train": {"a": 1}}}, "data.train = {'a': 1}, where a list of sources belongs"),
        ({"data": {"train": [1]}}, "data.train has the source 1, where a mapping with a path belongs"),
        ({"data": {"validation": [{"path": "a", "weight": "x"}]}}, "data.validation has the weight 'x'"),
    ],
)
def test_what_cannot_have_been_written_is_refused(changed: dict[str, Any], fault: str, tmp_path: Path) -> None:
    write_run(tmp_path, {"model": {"num_layers": 2}, **changed})
    with pytest.raises(CheckpointError, match=f"run.yaml: {fault}"):
        read_run(tmp_path)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    run = {"model": {"num_layers": 2}, "data": {"train": [{"path": "a", "weight": 1}], "validation": []}, "extra": 3}
    write_run(tmp_path, run)
    assert read_run(tmp_path) == run
