"""Shared by all tests: one pool of Gloo processes, and the tables that a run writes into tests/README.md."""

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# transformers copies the code of a model there and imports the copy: two processes of tests must not meet over it.
_modules = tempfile.TemporaryDirectory(prefix="transformers-modules-")
os.environ["HF_MODULES_CACHE"] = _modules.name

import torch  # noqa: E402 - the environment comes first

# Triton reads it when it is imported, and megatron-core imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from megatron_ext.testing.pool import GlooPool  # noqa: E402
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
    """Leave out what other cells of a product stand for; begin with what waits for others, while all else has work."""
    if not config.getoption(PRODUCT):
        left_out = [item for item in items if item.get_closest_marker("product")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("product")]
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what the folders and the dearest files cost, in seconds of all workers together."""
    folders: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                file = report.nodeid.partition("::")[0]
                files[file] += report.duration
                folders["/".join(file.split("/")[:2])] += report.duration
    terminalreporter.section("seconds")
    for name, seconds in [*folders.most_common(), *files.most_common(15)]:
        terminalreporter.write_line(f"{seconds:7.0f}  {name}")


@pytest.fixture(scope="session")
def pool() -> Iterator[GlooPool]:
    forkserver.context()
    with GlooPool(8) as processes:
        yield processes


@pytest.fixture(scope="session")
def repository() -> Path:
    return ROOT
