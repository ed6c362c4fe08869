"""What tests of this folder begin with: prepared data and a tiny run; a model as checkpoint and export, and copies."""

import shutil
from pathlib import Path

import pytest

from megatron_ext.model_io.convert import convert
from megatron_ext.testing.tiny import tiny_model
from tests.support.workspace import prepare_data, run_mapping, write_run
from tests.unit.model_io.own_models import write_checkpoint


@pytest.fixture(scope="package")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared data and `run.yaml`: six small steps, a checkpoint after every second one."""
    directory = tmp_path_factory.mktemp("robustness")
    prepare_data(directory)
    mapping = run_mapping(directory)
    mapping["model"] |= {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 32}
    write_run(directory / "run.yaml", mapping)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MoE model as a checkpoint in `megatron/iter_0000000`, and exported in several files to `hf`."""
    directory = tmp_path_factory.mktemp("made")
    convert(write_checkpoint(directory / "megatron", tiny_model(moe=True)), directory / "hf", shard_bytes=200_000)
    return directory


@pytest.fixture(params=["megatron/iter_0000000", "hf"])
def either(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> Path:
    """A copy of one of them."""
    return shutil.copytree(made / request.param, tmp_path / "copy")


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "megatron" / "iter_0000000", tmp_path / "iter_0000000")


@pytest.fixture
def export(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "hf", tmp_path / "hf")
