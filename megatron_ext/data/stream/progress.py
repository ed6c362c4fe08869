"""What a run has read, as its checkpoints say it: each finished stretch as it was, the one under way up to here.

A plan follows from configuration, sizes and this record, so that whatever is yet to come may be changed whenever a run
goes on, and nothing that was read is read again or forgotten.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config import load_config, to_mapping
from megatron_ext.config.data import Stage
from megatron_ext.data.stream.order import WINDOW
from megatron_ext.errors import CheckpointError
from megatron_ext.foreign import reading

_BATCHES = ("global_batch_size", "micro_batch_size")


@dataclass(frozen=True)
class Part:
    """A stretch of a stage that was read without a change."""

    stage: Stage
    """As the configuration had it."""
    sequence_length: int
    global_batch_size: int
    steps: int
    samples: int
    complete: bool
    """Nothing of the stage was left to read."""
    offset: int
    """Samples of its pattern that earlier parts read."""
    counts: Mapping[str, int]
    """Samples read of each source, by id."""
    starts: Mapping[str, int]
    """Tokens of each source's order before the first sample of the pattern."""
    skipped: Mapping[str, int]
    """Tokens of each source that were passed over before it."""
    taken: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """With `take`: the samples of each source in the whole pattern."""

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return self.samples * self.sequence_length


@dataclass(frozen=True)
class Progress:
    """What was read, in which order."""

    order: int
    """Version of the order of samples."""
    unit: int
    """Tokens that are read together."""
    seed: int
    fingerprints: Mapping[str, str]
    """Of the files of each source that was read, by id."""
    orders: Mapping[str, str]
    """shuffled or file, by id."""
    parts: tuple[Part, ...]
    windows: Mapping[str, int]
    """Units of a window of each source, by id."""

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return sum(part.steps for part in self.parts)

    @property
    def samples(self) -> int:
        """Samples consumed."""
        return sum(part.samples for part in self.parts)

    def positions(self) -> dict[str, int]:
        """Tokens of each source's order that lie behind the run: read, or passed over."""
        behind = dict.fromkeys(self.fingerprints, 0)
        for part in self.parts:
            for name, count in part.counts.items():
                behind[name] += count * part.sequence_length + part.skipped.get(name, 0)
        return behind


def definition(stage: Stage, sequence_length: int) -> dict[str, Any]:
    """What a stage says, as its file has it: defaults are left out, its sequence length is said.

    How its samples are cut into batches is no part of it: that may follow the machines, also where a stage is over.
    """
    said = {key: value for key, value in _said(stage).items() if key not in _BATCHES}
    return {**said, "sequence_length": sequence_length}


def definition_hash(stage: Stage, sequence_length: int) -> str:
    """Tells definitions apart, wherever their files stand and however they are written."""
    text = json.dumps(definition(stage, sequence_length), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def to_json(progress: Progress) -> dict[str, Any]:
    """What `from_json` makes an equal record of."""
    positions = progress.positions()
    return {
        "order": progress.order,
        "unit_tokens": progress.unit,
        "seed": progress.seed,
        "sources": {
            name: {"fingerprint": mark, "order": progress.orders[name], "position_tokens": positions[name]}
            | {"window_units": progress.windows[name]}
            for name, mark in progress.fingerprints.items()
        },
        "stages": [
            {
                **{field.name: _plain(getattr(part, field.name)) for field in dataclasses.fields(Part)},
                "stage": _said(part.stage),
                "hash": definition_hash(part.stage, part.sequence_length),
            }
            for part in progress.parts
        ],
    }


def from_json(raw: Mapping[str, Any], where: Path) -> Progress:
    """The record in the checkpoint at `where`.

    Raises:
        CheckpointError: it is none, or contradicts itself.
    """
    with reading(where, CheckpointError, advice="take it from a copy of the checkpoint"):
        sources = raw["sources"]
        progress = Progress(
            order=raw["order"],
            unit=raw["unit_tokens"],
            seed=raw["seed"],
            fingerprints={name: source["fingerprint"] for name, source in sources.items()},
            orders={name: source["order"] for name, source in sources.items()},
            parts=tuple(_part(entry, where) for entry in raw["stages"]),
            # Checkpoints older than this key had the largest, whatever the size of the source.
            windows={name: source.get("window_units", WINDOW) for name, source in sources.items()},
        )
        stated = {name: source["position_tokens"] for name, source in sources.items()}
        if progress.positions() != stated:
            raise ValueError("the positions of the sources are not the sums of the stages")
        for part, entry in zip(progress.parts, raw["stages"], strict=True):
            if sum(part.counts.values()) != part.samples:
                raise ValueError(f"the samples of stage {part.stage.name!r} are not those of its sources")
            if definition_hash(part.stage, part.sequence_length) != entry["hash"]:
                raise ValueError(f"the definition of stage {part.stage.name!r} was changed")
    return progress


def _part(entry: Mapping[str, Any], where: Path) -> Part:
    stage = load_config(Stage, dict(entry["stage"]), source=str(where))
    return Part(**{**{k: v for k, v in entry.items() if k != "hash"}, "stage": stage})


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _said(stage: Stage) -> dict[str, Any]:
    """The keys of a stage that are not as they are by default."""
    default = to_mapping(Stage(name=stage.name))
    said = {key: value for key, value in to_mapping(stage).items() if key == "name" or value != default[key]}
    if stage.take:
        amounts = to_mapping(stage)["take"].items()
        said["take"] = {name: {k: v for k, v in amount.items() if v is not None} for name, amount in amounts}
    return said
