"""A run of three stages, killed in each and changed after the second, reads and trains what the plan says."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint.find import require_checkpoint
from megatron_ext.checkpoint.state_file import read_state
from megatron_ext.checkpoint.streams import MegatronSource
from megatron_ext.config import read_yaml
from megatron_ext.data.stream.stream import BlendStream
from megatron_ext.testing.pool import GlooPool, WorkerFailure
from tests.robustness.runs import train_here
from tests.support.workspace import write_run

BATCH = 8
SPLITS = {"main": "train", "small": "validation", "tiny": "test"}
STAGES: list[dict[str, Any]] = [
    {"name": "first", "mix": {"main": 0.6, "small": 0.4}, "steps": 4},
    {"name": "second", "take": {"tiny": {"samples": 10}, "main": {"samples": 22}}},
    {"name": "third", "mix": {"main": 1}, "steps": 3},
]
CHANGED = [*STAGES[:2], {"name": "third", "mix": {"main": 0.5, "tiny": 0.5}, "steps": 4}]


def write_stages(work: Path, path: Path, stages: list[dict[str, Any]], **train: Any) -> Path:
    mapping = read_yaml(work / "run.yaml")
    mapping["train"] = {"global_batch_size": BATCH, "micro_batch_size": 2, **train}
    mapping["schedule"] = {"kind": "constant"}
    data = {key: mapping["data"][key] for key in ("sequence_length", "tokenizer")}
    sources = {name: {"path": str(work / "data" / split)} for name, split in SPLITS.items()}
    mapping["data"] = {**data, "sources": sources, "stages": stages}
    mapping["checkpoint"] = {"directory": str(path.with_suffix("")), "save_interval": 1}
    return write_run(path, mapping)


def train_and_die_at(path: Path, step: int) -> None:
    """Train; kill -9 when the batch of `step` is asked for."""
    real = BlendStream.next

    def dies(stream: BlendStream) -> Any:
        if stream.position().samples == BATCH * step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(stream)

    BlendStream.next = dies  # type: ignore[method-assign]
    train_here(path, [])


def losses(directory: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(record["iteration"], record["loss"]) for record in records if "loss" in record]


def test_killed_in_each_stage_and_changed_after_the_second(work: Path, pool: GlooPool, tmp_path: Path) -> None:
    planned = write_stages(work, tmp_path / "run.yaml", STAGES)
    straight = write_stages(work, tmp_path / "straight.yaml", CHANGED)
    pool.run(1, train_here, straight, [])
    with GlooPool(1) as alone:
        for step in (2, 6):
            with pytest.raises(WorkerFailure, match="rank 0 died"):
                alone.run(1, train_and_die_at, planned, step)
        alone.run(1, train_here, planned, ["train.stop_at_iteration=8"])
        changed = write_stages(work, tmp_path / "run.yaml", CHANGED)
        with pytest.raises(WorkerFailure, match="rank 0 died"):
            alone.run(1, train_and_die_at, changed, 10)
        alone.run(1, train_here, changed, [])
    ended, expected = tmp_path / "run", tmp_path / "straight"
    assert losses(ended) == losses(expected)
    weights, others = (MegatronSource(require_checkpoint(place)) for place in (ended, expected))
    assert all((weights.read(name) == others.read(name)).all() for name in others.specs)
    states = [read_state(require_checkpoint(place)) for place in (ended, expected)]
    assert states[0] == states[1]
    assert states[0].plan is not None
    counts = [part["counts"] for part in states[0].plan["stages"]]
    assert counts == [{"main": 19, "small": 13}, {"main": 22, "tiny": 10}, {"main": 16, "tiny": 16}]


def test_other_files_under_the_same_id_are_refused(work: Path, pool: GlooPool, tmp_path: Path) -> None:
    path = write_stages(work, tmp_path / "run.yaml", STAGES)
    pool.run(1, train_here, path, ["train.stop_at_iteration=1"])
    other = [f"data.sources.main.path={work}/data/validation", f"data.sources.small.path={work}/data/train"]
    with pytest.raises(WorkerFailure, match="source 'main': its files are not those that the run has read from"):
        pool.run(1, train_here, path, other)
    shutil.copytree(work / "data", tmp_path / "moved")
    moved = [f"data.sources.{name}.path={tmp_path}/moved/{split}" for name, split in SPLITS.items()]
    pool.run(1, train_here, path, [*moved, "train.stop_at_iteration=2"])
    with pytest.raises(
        WorkerFailure, match=r"order of samples \(1 with data.cache_dir, 2 without\): 2 in the checkpoint, 1"
    ):
        pool.run(1, train_here, work / "run.yaml", [f"checkpoint.directory={tmp_path / 'run'}"])
