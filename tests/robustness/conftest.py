"""Prepared data and a tiny run, made once for all tests of this folder."""

from pathlib import Path

import pytest

from tests.support.workspace import prepare_data, run_mapping, write_run


@pytest.fixture(scope="package")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared data and `run.yaml`: six small steps, a checkpoint after every second one."""
    directory = tmp_path_factory.mktemp("robustness")
    prepare_data(directory)
    mapping = run_mapping(directory)
    mapping["model"] |= {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 32}
    write_run(directory / "run.yaml", mapping)
    return directory
