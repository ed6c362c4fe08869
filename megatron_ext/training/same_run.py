"""Whether a checkpoint belongs to a run: the same model, the same samples, and every key that was changed since."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.canonical.adapters import adapter_pairs
from megatron_ext.canonical.catalogue import model_shapes
from megatron_ext.checkpoint.run_file import RUN_FILE, read_run
from megatron_ext.checkpoint.shape_faults import shape_faults, shown
from megatron_ext.checkpoint.state_file import BASE_KEY, STATE_FILE, TrainingState, read_scalars, read_state
from megatron_ext.checkpoint.streams import MegatronSource
from megatron_ext.config import (
    PRETRAIN,
    DataConfig,
    LoraConfig,
    ModelConfig,
    PreferenceTask,
    RunConfig,
    SftTask,
    TaskConfig,
    TrainConfig,
    load_config,
    to_mapping,
)
from megatron_ext.config.base import config
from megatron_ext.config.effective_value import effective_value
from megatron_ext.config.model_fields import TRAINING_FIELDS
from megatron_ext.data.stream.progress import from_json
from megatron_ext.errors import CheckpointError, ConfigError

OTHER_SAMPLES = (
    "{}: its position in the data would mean other samples:\n{}\nSet it back, or start a new run from its weights: "
    "another checkpoint.directory, and checkpoint.initialize_from"
)


def check_same_model(model: ModelConfig, checkpoint: Path) -> None:
    """Raise CheckpointError naming every field in which `checkpoint` holds another model than `model`."""
    raw = read_run(checkpoint).get("model") or {}
    check_models_agree(model, load_config(ModelConfig, raw, source=str(checkpoint / RUN_FILE)), checkpoint)


def trained_model(model: ModelConfig, state: TrainingState, checkpoint: Path) -> ModelConfig:
    """`model` with the rotary base of the stage that `checkpoint`, whose state is `state`, was trained in last."""
    if state.plan is None or not (parts := from_json(state.plan, checkpoint / STATE_FILE).parts):
        return model
    base = parts[-1].stage.rotary_base
    return model if base is None else replace(model, rotary_base=base)


def recorded_run(run: RunConfig, rotary_base: float) -> dict[str, Any]:
    """`run` as a checkpoint has it: the model turns with the base that it was trained with last.

    Every stage then says its own, so that the record read as a run means the same stages.
    """
    mapping = to_mapping(run)
    if any(stage.rotary_base is not None for stage in run.data.stages):
        mapping["model"]["rotary_base"] = rotary_base
        for stage in mapping["data"]["stages"]:
            stage["rotary_base"] = run.model.rotary_base if stage["rotary_base"] is None else stage["rotary_base"]
    return mapping


def check_models_agree(model: ModelConfig, saved: ModelConfig, checkpoint: Path) -> None:
    """Raise CheckpointError naming every field in which `saved`, the model of `checkpoint`, is another than `model`."""
    names = [
        name
        for name in ModelConfig.__dataclass_fields__
        if name not in TRAINING_FIELDS and effective_value(saved, name) != effective_value(model, name)
    ]
    # What means something else only because another key does is not worth a line of its own.
    names = [name for name in names if getattr(saved, name) != getattr(model, name)] or names
    if names:
        different = [
            f"  model.{name}: {getattr(saved, name)!r} in the checkpoint, {getattr(model, name)!r} in this run"
            for name in names
        ]
        listed = "\n".join(different)
        raise CheckpointError(
            f"{checkpoint} holds another model:\n{listed}\nTake its values, or other weights to start from"
        )


def check_holds_weights(model: ModelConfig, checkpoint: Path) -> None:
    """Raise CheckpointError naming the weights of `model` that `checkpoint` lacks, or has in another shape."""
    stored = {name: spec.shape for name, spec in MegatronSource(checkpoint).specs.items()}
    if faults := shape_faults(stored, model_shapes(model), "this run needs"):
        raise CheckpointError(f"{checkpoint} lacks weights of its own model:\n{shown(faults)}")


def check_same_data(data: DataConfig, train: TrainConfig, checkpoint: Path) -> None:
    """Raise CheckpointError where the position in `checkpoint` counts other samples than those of this run."""
    saved = read_run(checkpoint)
    then, now = saved.get("data") or {}, to_mapping(data)
    old_seed = (saved.get("train") or {}).get("seed")
    # Where the order is computed, the plan tells what may change.
    by_index = (
        [("data.sequence_length", then.get("sequence_length"), now["sequence_length"])] if data.order == 1 else []
    )
    compared = [
        *by_index,
        ("train.seed", old_seed, train.seed),
        # The tokens would be the same, but not what is computed from them: as little as another model may this change
        # unnoticed on the way. Checkpoints older than these keys had them off.
        *((f"data.{key}", then.get(key, False), now[key]) for key in ("reset_attention_mask", "reset_position_ids")),
    ]
    different = [f"  {key}: {old!r} in the checkpoint, {new!r} in this run" for key, old, new in compared if old != new]
    weights = [[source.get("weight", 1.0) for source in mapping.get("train") or []] for mapping in (then, now)]
    if data.order == 1 and _shares(weights[0]) != _shares(weights[1]):
        different.append(f"  weights of data.train: {weights[0]} in the checkpoint, {weights[1]} in this run")
    if different:
        raise CheckpointError(OTHER_SAMPLES.format(checkpoint, "\n".join(different)))


def check_same_task(task: TaskConfig, checkpoint: Path, *, has_adapters: bool) -> None:
    """Raise CheckpointError where `checkpoint` was trained for another loss than `task`.

    What a key that is left out means is as good as what another says.

    Args:
        has_adapters: whether this run trains adapters, which a reference that is not named depends on.
    """
    saved = read_run(checkpoint)
    raw = saved.get("task") or to_mapping(PRETRAIN)  # older ones knew nothing else
    source = str(checkpoint / RUN_FILE)
    then = _meaning(load_config(_Task, {"task": raw}, source=source).task, saved.get("adapters") is not None)
    now = _meaning(task, has_adapters)
    different = [
        f"  task.{key}: {then.get(key)!r} in the checkpoint, {now.get(key)!r} in this run"
        for key in dict.fromkeys([*then, *now])
        if then.get(key) != now.get(key)
    ]
    if different:
        raise CheckpointError(
            f"{checkpoint} was trained for another loss:\n"
            + "\n".join(different)
            + "\nSet it back, or start a new run "
            "from its weights: another checkpoint.directory, and checkpoint.initialize_from"
        )


@config
class _Task:
    """The section `task` alone."""

    task: TaskConfig


def _meaning(task: TaskConfig, has_adapters: bool) -> dict[str, str]:
    """What decides which loss `task` is, by key, with defaults applied."""
    if isinstance(task, SftTask):
        return {"kind": task.kind, "weighting": task.weighting}
    if isinstance(task, PreferenceTask):
        compared, reference = "mean" if task.by_means else "sum", task.reference_of(has_adapters=has_adapters)
        return {"kind": task.kind, "loss": task.loss, "log_probs": compared, "reference": reference}
    return {"kind": task.kind}


def check_same_adapters(model: ModelConfig, adapters: LoraConfig | None, checkpoint: Path) -> None:
    """Raise CheckpointError where what `checkpoint` holds of `model` are other adapters than `adapters`, or none."""
    record = read_scalars(checkpoint).get(BASE_KEY)
    then = None if record is None else load_config(LoraConfig, record["adapters"], source=str(checkpoint / STATE_FILE))
    old, new = (
        {pair.a: (pair.rank, pair.scale) for pair in adapter_pairs(model, one)} if one is not None else {}
        for one in (then, adapters)
    )
    if old == new:
        return
    if then is None or adapters is None:
        held, trained = ("a whole model", "adapters") if then is None else ("adapters alone", "all weights")
        lines = [f"it holds {held}, and this run trains {trained}"]
    else:
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        kinds = {(old.get(name), new.get(name)): name.removesuffix(".A") for name in reversed(names)}
        lines = [f"{name}: {_said(a)} in the checkpoint, {_said(b)} in this run" for (a, b), name in kinds.items()]
    raise CheckpointError(
        f"adapters: not those of {checkpoint}:\n" + "\n".join(f"  {line}" for line in lines) + "\nSet them back, or "
        "start a new run in another checkpoint.directory"
    )


def _said(one: tuple[int, float] | None) -> str:
    return "none" if one is None else f"rank {one[0]}, scale {one[1]:g}"


def check_same_sources(fingerprints: Sequence[str], state: TrainingState, where: str | Path) -> None:
    """Raise CheckpointError where the training data is not that in which `state` counts its samples."""
    if state.consumed_samples and state.data not in ((), tuple(fingerprints)):
        other = "  data.train: what stands there is not the data of the checkpoint"
        raise CheckpointError(OTHER_SAMPLES.format(where, other))


def changed_keys(run: RunConfig, checkpoint: Path) -> list[str]:
    """Every key whose value in `run` is not the one `checkpoint` was saved with, as `key: old -> new`."""
    return [f"{key}: {old} -> {new}" for key, old, new in changed_values(run, checkpoint)]


def levers(run: RunConfig, checkpoint: Path) -> list[tuple[str, str, str]]:
    """Of the changed keys with their old and new values those that bear on what is computed."""
    apart = (
        "logging.",
        "runtime.",
        "checkpoint.",
        "guard.gradient_",
        "train.stop_at_iteration",
        "train.eval_",
        "train.exit_at",
        "parallel.overlap_",
        "precision.keep_fp8_weights",
        "recompute.",
        "optimizer.moments_on_host",
    )
    return [change for change in changed_values(run, checkpoint) if not change[0].startswith(apart)]


def changed_values(run: RunConfig, checkpoint: Path) -> list[tuple[str, str, str]]:
    """Every key whose value in `run` is not the one `checkpoint` was saved with, with the old and the new one."""
    base = (read_run(checkpoint).get("model") or {}).get("rotary_base", run.model.rotary_base)
    # Whether the base is that of the stage trained last, `trained_model` says.
    now = recorded_run(run, base)
    saved = {**now, **read_run(checkpoint)}  # weights that were converted come with the section model alone
    with contextlib.suppress(ConfigError):  # keys that are newer than the checkpoint get their defaults
        saved = to_mapping(load_config(RunConfig, saved, source=str(checkpoint)))
    old, new = ({key: repr(value) for key, value in _leaves(one)} for one in (saved, now))
    keys = dict.fromkeys([*new, *old])
    if run.data.stages:
        keys.pop("train.train_iters", None)  # it follows from them
    pairs = [(key, old.get(key, "nothing"), new.get(key, "nothing")) for key in keys]
    # A key that is unset says as much as one that is not there.
    return [pair for pair in pairs if pair[1] != pair[2] and {*pair[1:]} != {"nothing", "None"}]


def rereads(
    data: DataConfig,
    train: TrainConfig,
    checkpoint: Path,
    fingerprints: Sequence[str],
    trained_with: dict[str, Any] | None = None,
) -> str | None:
    """Why a new run from the weights of `checkpoint` would read again, in the same order, what those have seen.

    Args:
        fingerprints: of the data of the new run.
        trained_with: the configuration of their run, where `checkpoint` is an export that has it elsewhere.
    """
    saved, state = trained_with or {}, TrainingState()
    if trained_with is None:
        try:
            saved, state = read_run(checkpoint), read_state(checkpoint)
        except CheckpointError:
            return None  # weights that come with no record of their training
    then, seed = saved.get("data") or {}, (saved.get("train") or {}).get("seed")
    if bool(then.get("pack_documents")) != data.pack_documents:
        return None  # packs of documents are others than stretches of the file, and in another order
    if state.data:
        same = bool(set(state.data) & set(fingerprints))
    else:
        before = [*(then.get("train") or []), *(then.get("sources") or {}).values()]
        now = [*(source.path for source in data.train), *(source.path for source in data.sources.values())]
        same = bool({_place(source["path"]) for source in before} & set(map(_place, now)))
    if not same or seed != train.seed:
        return None
    return (
        f"train.seed = {seed}: the weights of {checkpoint} come from a run with this data and seed, so that this run "
        "would read the same samples from the first on; set another train.seed"
    )


def _shares(weights: Sequence[float]) -> list[float]:
    """Weights of a blend made shares as megatron-core does: where these are equal, exactly, the samples are."""
    values = np.array(weights, dtype=np.float64)
    return list((values / values.sum()).tolist())


def _place(path: str) -> Path:
    return Path(path).resolve()


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested mappings and lists of mappings, by its key."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _leaves(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        for number, part in enumerate(value):
            yield from _leaves(part, f"{key}.{number}")
    else:
        yield key, value
