"""Runs over context-parallel processes, with documents kept apart, train and validate what one process does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.monitoring.metrics_file import read_metrics
from tests.support.commands import train
from tests.support.workspace import prepare_data, run_mapping, write_run

CONTEXT = ["parallel.context_parallel_size=2", "data.num_workers=1"]
DOCUMENTS = ["data.reset_attention_mask=true", "data.reset_position_ids=true"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("work")
    prepare_data(directory)
    mapping = run_mapping(directory, moe=True)
    mapping["train"] |= {"eval_interval": 3, "eval_iters": 2}
    write_run(directory / "run.yaml", mapping)
    return directory


def figures(directory: Path) -> list[dict[str, float]]:
    """Step, loss, gradient norm, validation loss, balance loss and load of each record."""
    names = ("iteration", "loss", "grad_norm", "validation_loss", "balance_loss", "expert_load")
    records = read_metrics(directory / "metrics.jsonl")
    return [{key: x for n in names if n in record for key, x in numbers(n, record[n])} for record in records]


def numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Each number within `value`, with where it stands."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for part, inner in parts:
            yield from numbers(f"{name}.{part}", inner)
    else:
        yield name, value


def run(processes: int, work: Path, name: str, *options: str) -> Path:
    directory = work / name
    process = train(processes, work / "run.yaml", *options, f"checkpoint.directory={directory}")
    assert process.returncode == 0, process.stderr
    return directory


def test_documents_over_context_parallel_processes(work: Path) -> None:
    alone = figures(run(1, work, "alone", *DOCUMENTS))
    run(2, work, "split", *DOCUMENTS, *CONTEXT, "train.stop_at_iteration=3")
    # The second half with twice the data-parallel ranks.
    split = figures(run(4, work, "split", *DOCUMENTS, *CONTEXT))
    assert len(split) == len(alone)
    # As in the parity grid; the figures in the file have all their digits.
    for ours, expected in zip(split, alone, strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)
    whole = figures(run(1, work, "whole", "train.stop_at_iteration=1"))
    assert whole[0]["loss"] != pytest.approx(alone[0]["loss"], rel=1e-5), "keeping documents apart changed nothing"
