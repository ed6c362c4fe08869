"""A training configuration beside a Megatron checkpoint that was made here: ready to train it from step 0."""

import logging
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_ext.config import ModelConfig, RunConfig, dump_yaml, load_config, to_mapping
from megatron_ext.config.base import fields_of
from megatron_ext.errors import ConfigError, ConversionError
from megatron_ext.model_io.prepared_data import sections_for

log = logging.getLogger(__name__)

RECIPE_HEAD = "# Trains "
"""How a training configuration of ours begins."""
_UNKNOWN: dict[str, Any] = {
    "precision": {"kind": "bf16"},
    "train": {"train_iters": 10000, "global_batch_size": 1024, "micro_batch_size": 1},
    "optimizer": {"kind": "adam", "lr": 3e-4},
}
"""What a Hugging Face directory does not say about its training."""
_ANOTHER_SEED = 1000
"""Added to a seed, it makes another order. The sources of a blend have seed, seed + 1 and so on."""


@dataclass(frozen=True)
class Recipe:
    """The text of a training configuration."""

    text: str
    notes: Sequence[str] = ()
    """What was set otherwise than in the run that trained the source, for people."""


@dataclass(frozen=True)
class Target:
    """What a configuration is for."""

    checkpoint: str
    """The Megatron checkpoint, as it was named."""
    model: ModelConfig
    """What is trained."""
    made: str
    """How the checkpoint was made, such as `upcycled by copy`."""
    source_run: Mapping[str, Any] = field(default_factory=dict)
    """The run that trained its source; empty where nobody knows."""
    tokenizer: Path | None = None
    comments: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Lines above a section, by the line that begins it (`train:`)."""
    data: str | Path | None = None
    """A prepared dataset to train on, which then says task, batches and steps; None: what the source's run read."""


def recipe_path(target: str | Path) -> Path:
    """The training configuration beside a Megatron checkpoint."""
    target = Path(target)
    return target.with_name(target.name + ".yaml")


def require_recipe_place(recipe: Path, *, force: bool) -> None:
    """Raise ConversionError where the file may not be written."""
    if not recipe.exists():
        return
    if not force:
        raise ConversionError(f"{recipe} exists; choose another target or pass --force to replace it")
    if not recipe.is_file() or not recipe.read_bytes().startswith(RECIPE_HEAD.encode()):
        raise ConversionError(
            f"{recipe} exists and is no training configuration that was made here: not replaced, even with --force"
        )


def training_recipe(target: Target) -> Recipe:
    """A run that trains `target` from step 0, made of the source's own run where it has one.

    Raises:
        ConfigError: there is no run that trains this model.
        ConversionError: `target.data` is not what this model can be trained on.
    """
    if target.data is not None:
        return _recipe_for_data(target, target.data)
    source, defaults = target.source_run, _defaults(target)
    raw = {name: source[name] for name in RunConfig.__dataclass_fields__ if name in source}
    raw = {**defaults, **raw} if "train" in raw else defaults
    notes = []
    if "train" in source:
        old = raw["train"].get("seed", 1234)
        new = (old + _ANOTHER_SEED) % 2**31
        raw["train"] = {**raw["train"], "seed": new}
        notes.append(
            f"train.seed is {new}: with the source's, {old}, the same samples would be read again from the first"
        )
    raw["model"] = to_mapping(target.model)
    raw["schedule"] = _rewarmed(raw)
    if raw["data"].get("stages"):
        # They say how long the run is; what was cut short on the way may be longer now.
        raw["train"] = {key: value for key, value in raw["train"].items() if key != "train_iters"}
    raw["checkpoint"] = {**raw.get("checkpoint", {}), **_places(target)}
    run, changes = _trainable(raw)
    comments = _lists(target)
    for note in notes:
        comments.setdefault("train:", []).append(f"{note}.")
    known = "train" in source
    made_from = "the source's run" if known else "usual values; fill in data.train, and your own batches"
    return Recipe(_commented(dump_yaml(_without_defaults(run)), target, comments, changes, made_from), notes)


def _recipe_for_data(target: Target, data: str | Path) -> Recipe:
    """A run on a prepared dataset; of the source's run it has the layout and the precision."""
    raw = sections_for(data, target.model.max_position_embeddings, target.tokenizer)
    raw["precision"] = _UNKNOWN["precision"]
    raw |= {name: target.source_run[name] for name in ("parallel", "precision") if name in target.source_run}
    raw |= {"model": to_mapping(target.model), "checkpoint": {**raw["checkpoint"], **_places(target)}}
    run, changes = _trainable(raw)
    made_from = f"what {data} holds and usual values"
    return Recipe(_commented(dump_yaml(_without_defaults(run)), target, _lists(target), changes, made_from))


def _places(target: Target) -> dict[str, str]:
    return {"directory": f"{target.checkpoint}-trained", "initialize_from": target.checkpoint}


def _lists(target: Target) -> dict[str, list[str]]:
    return {line: list(lines) for line, lines in target.comments.items()}


def recipe_if_trainable(target: Target) -> Recipe | None:
    """The same; None, with a warning, where no run of ours can train the model."""
    try:
        return training_recipe(target)
    except ConfigError as error:
        log.warning("no training configuration for %s: %s", target.checkpoint, error)
        return None


def _trainable(raw: dict[str, Any]) -> tuple[RunConfig, dict[str, str]]:
    """The run, without what a dense run may have and a MoE run may not; and a comment on each section that changed."""
    try:
        return load_config(RunConfig, raw, source="the source's run"), {}
    except ConfigError as error:
        fault = error
    sequence_parallel = {"parallel": {**raw.get("parallel", {}), "sequence_parallel": True}}
    parallel: dict[str, Any] = {"parallel": {}}
    precision = {"precision": _UNKNOWN["precision"]}
    for change in (
        sequence_parallel,
        parallel,
        precision,
        {**sequence_parallel, **precision},
        {**parallel, **precision},
    ):
        try:
            run = load_config(RunConfig, {**raw, **change}, source="the source's run")
        except ConfigError:
            continue
        comments = {
            f"{section}:": f"The source's run has {raw.get(section)}, with which this one is refused: {fault}"
            for section in change
        }
        for section, comment in comments.items():
            log.warning("the training configuration changes %s %s", section, comment)
        return run, comments
    raise fault


def _defaults(target: Target) -> dict[str, Any]:
    data = {
        "sequence_length": min(target.model.max_position_embeddings, 4096),
        "tokenizer": str(target.tokenizer or "TOKENIZER"),
        "train": [{"path": "DATA/train"}],
    }
    return {**_UNKNOWN, "data": data, "checkpoint": {"save_interval": 1000}}


def _rewarmed(raw: dict[str, Any]) -> dict[str, Any]:
    """A cosine from the peak to a tenth of it, after a warmup of a hundredth of the run."""
    steps, peak = raw["train"]["train_iters"], raw["optimizer"]["lr"]
    return {"kind": "cosine", "warmup_iters": max(steps // 100, 1), "min_lr": float(f"{peak / 10:.6g}")}


def _without_defaults(section: Any) -> dict[str, Any]:
    """The configuration as a person would write it: what is not at its default, and every `kind`."""
    known = fields_of(type(section))
    result: dict[str, Any] = {}
    for name in (item.name for item in fields(section)):
        value, info = getattr(section, name), known[name]
        if name != "kind" and not info.is_required() and value == info.get_default(call_default_factory=True):
            continue
        result[name] = _plain(value)
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return _without_defaults(value) if hasattr(value, "__dataclass_fields__") else value


def _commented(
    text: str, target: Target, comments: dict[str, list[str]], changes: dict[str, str], made_from: str
) -> str:
    header = [
        f"{RECIPE_HEAD}{target.checkpoint}, {target.made}. Made from {made_from}.",
        f"#   torchrun --nproc-per-node N tools/train.py {recipe_path(target.checkpoint)}",
    ]
    lines: list[str] = []
    for line in text.splitlines():
        for comment in [*comments.get(line, []), changes.pop(line, "")]:
            lines += textwrap.wrap(comment, 110, initial_indent="# ", subsequent_indent="# ")
        lines.append(line)
    left = [wrapped for change in changes.values() for wrapped in textwrap.wrap(change, 110)]
    return "\n".join([*header, *(f"# {line}" for line in left), *lines]) + "\n"
