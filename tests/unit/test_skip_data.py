"""`tools/train.py --skip-data` is the key train.skip_samples, so that checkpoints and reports have it."""

import argparse
from pathlib import Path

import pytest

from megatron_ext.config import load_run
from tests.support.workspace import run_mapping, write_run
from tools import train


def test_ranges_are_added_to_those_of_the_run(tmp_path: Path) -> None:
    mapping = run_mapping(tmp_path)
    mapping["train"]["skip_samples"] = [[1, 2]]
    path = str(write_run(tmp_path / "run.yaml", mapping))
    arguments = argparse.Namespace(run=path, overrides=["train.seed=7"], skip_data=[[8, 15], [40, 40]])
    train._skip_data(arguments)
    assert load_run(path, arguments.overrides).train.skip_samples == [[1, 2], [8, 15], [40, 40]]


@pytest.mark.parametrize("text", ["5", "5:", "5:2", "a:b", "-1:3", "1:2:3"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be FIRST:LAST"):
        train._range(text)
    assert train._range("1_000:2_000") == [1000, 2000]
