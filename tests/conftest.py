"""Shared by all tests: one pool of Gloo processes, and the tables that a run writes into tests/README.md."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from megatron_ext.testing.pool import GlooPool  # noqa: E402 - the environment comes first

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def pool() -> Iterator[GlooPool]:
    with GlooPool(8) as processes:
        yield processes


@pytest.fixture(scope="session")
def repository() -> Path:
    return ROOT
