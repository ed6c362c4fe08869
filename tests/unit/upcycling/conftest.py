"""Checkpoints of the dense models, written once a module."""

from pathlib import Path

import pytest

from tests.support.checkpoints import write_checkpoint
from tests.unit.upcycling.models import DENSE_MODELS


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dense")
    return {name: write_checkpoint(folder / name, model) for name, model in DENSE_MODELS.items()}
