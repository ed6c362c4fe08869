"""From what a planner is given to a run, and from the layout it chose to a file that trains as it is."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ext.config import RunConfig, dump_yaml, load_config, load_run, read_yaml, to_mapping
from megatron_ext.errors import ConfigError
from megatron_ext.files import require_writable, write_text
from megatron_ext.planning.search import Search

_SHAPE_ALONE: dict[str, Any] = {
    "precision": {"kind": "bf16"},
    "train": {"train_iters": 100_000, "global_batch_size": 1024},
    "optimizer": {"kind": "adam", "lr": 3e-4},
    "schedule": {"kind": "cosine", "warmup_iters": 2000},
    "data": {"tokenizer": "tokenizer", "train": [{"path": "data/train"}]},
    "checkpoint": {"directory": "runs/planned", "save_interval": 500, "keep_last": 3},
}
"""What a run is beside the shape of its model, where nothing else is said: to be changed before it trains."""


def run_to_plan(path: str, overrides: list[str]) -> RunConfig:
    """The run at `path`; of a file that has a model and not a whole run, one with usual values around it.

    Raises:
        ConfigError: listing every fault.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict) or {"train", "data"} & set(raw):
        return load_run(path, overrides)
    longest = raw["model"].get("max_position_embeddings")
    # What is no number is said by the loader, with the other faults.
    length = int(min(longest, 4096)) if isinstance(longest, int | float) and longest >= 1 else 4096
    around = {**_SHAPE_ALONE, "data": {**_SHAPE_ALONE["data"], "sequence_length": length}}
    return load_config(RunConfig, {**around, **raw}, overrides, source=path)


def planned_run(found: Search, number: int, tokens: float | None) -> RunConfig:
    """The run in the layout `number` of the table, counted from 1; with as many steps as `tokens` take, if given.

    Raises:
        ConfigError: there is no such layout.
    """
    if not found.chosen:
        raise ConfigError("--write: no layout fits, so there is none to write; see above what it takes")
    if number > len(found.chosen):
        raise ConfigError(
            f"--choose {number}: the table has {len(found.chosen)} layouts; take one of those, or more with --best"
        )
    run = found.chosen[number - 1].candidate.run
    if tokens is None or run.data.stages:
        return run
    # What a ramp's steps lack is made up for by steps behind it.
    train, size = run.train, run.train.global_batch_size
    missing = train.train_iters * size - run.planned_samples
    steps = math.ceil((tokens / run.data.sequence_length + missing) / size)
    return replace(run, train=replace(train, train_iters=steps))


def require_new(path: str) -> None:
    """Raise where a plan cannot be written to `path`, before the work is done.

    Raises:
        ConfigError: something is there.
        DataError: nothing can be written there.
    """
    if Path(path).exists():
        raise ConfigError(f"--write {path}: is there already; choose another name, or move it away")
    require_writable(path)


def write_planned(run: RunConfig, path: str) -> None:
    """Write `run` to a new file at `path`.

    Raises:
        ConfigError: something is there, or the run is not right with so many steps.
    """
    require_new(path)
    load_config(RunConfig, to_mapping(run), source=f"the run for --write {path}")
    write_text(Path(path), dump_yaml(to_mapping(run)))
