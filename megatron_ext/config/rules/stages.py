"""Rules of the stages of data: what a run reads, for how long, and in which batches."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_ext.config.base import fields_of
from megatron_ext.config.data import Amount, DataConfig, DataSource, Stage, StagedSource
from megatron_ext.config.rules.registry import rule, violations
from megatron_ext.config.training import TrainConfig

_OWN = {
    "sequence_length": "data.sequence_length",
    "global_batch_size": "train.global_batch_size",
    "micro_batch_size": "train.micro_batch_size",
    "rotary_base": "model.rotary_base",
}
"""What a stage may have of its own, and whose place it takes."""


@rule(given=("data.train", "data.stages", "data.sources", "data.cache_dir", "train.train_iters"))
def _one_way_to_say_what_is_read(
    train: Sequence[DataSource],
    stages: Sequence[Stage],
    sources: Mapping[str, StagedSource],
    cache_dir: str | None,
    train_iters: int,
) -> list[str]:
    faults = []
    if not train and not stages:
        faults.append("data.train: is required, or data.sources with data.stages")
    if train and (stages or sources):
        faults.append("data.train: one blend for the whole run; with data.sources and data.stages leave it out")
    if stages and cache_dir is not None:
        faults.append(f"data.cache_dir = {cache_dir!r}: the order of data.stages is computed, not kept; leave it out")
    if train and not train_iters:
        faults.append(f"train.train_iters = {train_iters}: must be greater than or equal to 1 with data.train")
    return faults


@rule(given=("data.train", "data.validation", "data.cache_dir"))
def _computed_order_needs_ids(
    train: Sequence[DataSource], validation: Sequence[DataSource], cache_dir: str | None
) -> list[str]:
    faults = []
    for key, blend in (("data.train", train), ("data.validation", validation)):
        ids = [source.id or source.path for source in blend]
        if cache_dir is None and (twice := next((name for name in ids if ids.count(name) > 1), None)):
            faults.append(f"{key}: {twice!r} is there twice; one entry with the sum of the weights reads the same")
    return faults


@rule(given=("data.sources",))
def _ids_can_be_read(sources: Mapping[str, StagedSource]) -> list[str]:
    return [
        f"data.sources: the id {name!r} cannot be shown in tables and reports; give it a name of letters"
        for name in sources
        if not name.strip() or not name.isprintable()
    ]


@rule(given=("data.stages", "model.position_embedding_type"))
def _a_base_is_of_rotary_embedding(stages: Sequence[Stage], positions: str) -> list[str]:
    return [
        f"data.stages.{number}.rotary_base = {stage.rotary_base:g}, model.position_embedding_type = {positions!r}: "
        "learned positions have no base; leave it out"
        for number, stage in enumerate(stages)
        if stage.rotary_base is not None and positions != "rope"
    ]


@rule(given=("data.pack_documents", "data.stages", "data.train", "data.cache_dir", "data.sequence_length"))
def _packs_are_samples(
    packed: bool, stages: Sequence[Stage], train: Sequence[DataSource], cache_dir: str | None, length: int
) -> list[str]:
    if not packed:
        return []
    faults = []
    if train and cache_dir is not None:
        faults.append(
            f"data.pack_documents = true, data.cache_dir = {cache_dir!r}: megatron-core's order is not packed; leave "
            "data.cache_dir out"
        )
    lengths = {stage.sequence_length or length for stage in stages}
    if len(lengths) > 1:
        shown = ", ".join(map(str, sorted(lengths)))
        faults.append(f"data.pack_documents = true: the stages have the sequence lengths {shown}; packs are of one")
    return faults


@rule(given=("data.pack_documents", "data.unit_tokens"))
def _a_pack_is_a_unit(packed: bool, unit: int | None) -> str | None:
    if packed and unit is not None:
        return f"data.pack_documents = true, data.unit_tokens = {unit}: a pack is a unit; leave data.unit_tokens out"
    return None


@rule(given=("data.stages",))
def _stages_are_whole(stages: Sequence[Stage]) -> list[str]:
    # That their sources are there is said by the plan: a finished stage may have read one that is gone since.
    faults = []
    names = [stage.name for stage in stages]
    for number, stage in enumerate(stages):
        key = f"data.stages.{number}"
        if stage.name in names[:number]:
            faults.append(f"{key}.name = {stage.name!r}: an earlier stage has this name; checkpoints tell them by it")
        faults += [f"{key}.{fault}" for fault in _faults_of(stage)]
    return faults


def _faults_of(stage: Stage) -> Iterator[str]:
    if bool(stage.mix) == bool(stage.take):
        yield "mix: exactly one of mix and take says what is read"
    for name, weight in stage.mix.items():
        if weight <= 0:
            yield f"mix.{name} = {weight}: must be greater than 0; leave out what is not read"
    lengths = [key for key in ("tokens", "steps", "samples") if getattr(stage, key) is not None]
    if stage.mix and len(lengths) != 1:
        yield f"tokens: exactly one of tokens, steps and samples says how long a mix is read, not {lengths or 'none'}"
    if stage.take and lengths:
        yield f"{lengths[0]}: take says how long the stage is; leave {', '.join(lengths)} out"
    for name, amount in stage.take.items():
        if len(_said(amount)) != 1:
            yield f"take.{name}: exactly one of epochs, tokens and samples, not {_said(amount) or 'none'}"


def can_be_planned(data: DataConfig, train: TrainConfig) -> bool:
    """Whether the rules above find nothing wrong with what is read: a plan of anything else means nothing."""
    said = _one_way_to_say_what_is_read(data.train, data.stages, data.sources, data.cache_dir, train.train_iters)
    return not said and not _stages_are_whole(data.stages)


def _said(amount: Amount) -> list[str]:
    return [key for key in ("epochs", "tokens", "samples") if getattr(amount, key) is not None]


def stage_violations(values: Mapping[str, Any]) -> list[str]:
    """The complaints about what a stage has of its own: whatever holds for a run's keys holds for each stage's."""
    found: list[str] = []
    for number, stage in enumerate(values.get("data.stages") or []):
        key = f"data.stages.{number}"
        here = {
            **values,
            **{whose: getattr(stage, own) for own, whose in _OWN.items() if getattr(stage, own) is not None},
        }
        if number:
            here.pop("train.batch_size_ramp", None)  # it is over with the first stage
        if stage.schedule is not None:
            here = {name: value for name, value in here.items() if not name.startswith("schedule.")}
            here.update(_leaves("schedule", stage.schedule))
            here["train.train_iters"] = 0  # its length is not the run's
        if here != values:
            known = set(violations(values))
            found += [f"{key} ({stage.name}): {fault}" for fault in violations(here) if fault not in known]
    return found


def _leaves(key: str, section: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a section, and those of sections in it."""
    for name in fields_of(type(section)):
        value = getattr(section, name)
        yield f"{key}.{name}", value
        if hasattr(value, "__pydantic_fields__"):
            yield from _leaves(f"{key}.{name}", value)
