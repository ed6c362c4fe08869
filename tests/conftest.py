"""Shared by all tests: one pool of Gloo processes, and the tables that a run writes into tests/README.md."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from megatron_ext.testing.pool import GlooPool  # noqa: E402 - the environment comes first
from tests.support import forkserver  # noqa: E402

# The same examples on every machine, and none that fails because the machine is busy.
hypothesis.settings.register_profile("here", derandomize=True, deadline=None)
hypothesis.settings.load_profile("here")

ROOT = Path(__file__).resolve().parents[1]
WRITE_CONVERSION_TABLE = "--write-conversion-table"
PRODUCT = "--product"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(WRITE_CONVERSION_TABLE, action="store_true", help="write the README's table of architectures")
    parser.addoption(PRODUCT, action="store_true", help="also run the cells of products that other cells stand for")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the rest of each product, and keep the tests of a file in one process: they share what they made."""
    if not config.getoption(PRODUCT):
        left_out = [item for item in items if item.get_closest_marker("product")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("product")]
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(ROOT))))


@pytest.fixture(scope="session")
def pool() -> Iterator[GlooPool]:
    forkserver.context()
    with GlooPool(8) as processes:
        yield processes


@pytest.fixture(scope="session")
def repository() -> Path:
    return ROOT
