"""Runs that several tests of reports read."""

from pathlib import Path

import pytest

from tests.unit.monitoring.reported_runs import write_metrics


@pytest.fixture
def named(tmp_path: Path) -> list[str]:
    dense = write_metrics(tmp_path / "dense.jsonl", 10, loss=9.0)
    moe = write_metrics(tmp_path / "moe.jsonl", 5, loss=4.0, experts=True)
    return [f"dense={dense}", f"MoE={moe}"]
