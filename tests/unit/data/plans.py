"""Plans for tests: few words for sources and stages."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.config import DataConfig, TrainConfig, load_config
from megatron_ext.data.stream.make_plan import SourceSize, make_plan
from megatron_ext.data.stream.plan import RunPlan
from megatron_ext.data.stream.progress import Progress, from_json, to_json

LENGTH = 8


def sizes_of(samples: Mapping[str, int], length: int = LENGTH) -> dict[str, SourceSize]:
    """Sizes of sources that have so many samples an epoch."""
    return {name: SourceSize(count * length + 1, f"files of {name}") for name, count in samples.items()}


def planned(
    samples: Mapping[str, int],
    stages: Sequence[Mapping[str, Any]],
    batch: int = 16,
    progress: Progress | None = None,
    length: int = LENGTH,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 1234,
    **data: Any,
) -> RunPlan:
    """The plan of `stages` over sources that have so many samples an epoch."""
    raw = {"sequence_length": length, "tokenizer": "t", "stages": [dict(stage) for stage in stages], **data}
    raw["sources"] = {name: {"path": name, **(sources or {}).get(name, {})} for name in samples}
    unit = data.get("unit_tokens") or max(stage.get("sequence_length", length) for stage in stages)
    config = load_config(DataConfig, raw, source="test")
    train = TrainConfig(global_batch_size=batch, seed=seed)
    return make_plan(config, train, sizes_of(samples, unit), progress)


def stored(plan: RunPlan, sample: int) -> Progress:
    """What was read before `sample`, once it has been in a file."""
    return from_json(json.loads(json.dumps(to_json(plan.progress(sample)))), Path("state.json"))
