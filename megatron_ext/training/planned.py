"""The plan of a run's data, made of its configuration, the files it names and the checkpoint that it goes on from."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_ext.checkpoint.state_file import STATE_FILE, TrainingState
from megatron_ext.config import DataConfig, RunConfig, TrainConfig
from megatron_ext.config.data import Stage, source_ids
from megatron_ext.data.dataset import DATASET_FILE, dataset_fingerprint, described
from megatron_ext.data.stream.make_plan import SourceSize, make_plan, stages_of
from megatron_ext.data.stream.packing import packs_of
from megatron_ext.data.stream.plan import RunPlan, pattern_of
from megatron_ext.data.stream.progress import Part, Progress, from_json
from megatron_ext.errors import CheckpointError, ConfigError


def source_paths(data: DataConfig) -> dict[str, tuple[str, str]]:
    """The key and the path of each source that is trained on, by id."""
    if data.sources:
        return {name: (f"data.sources.{name}.path", source.path) for name, source in data.sources.items()}
    ids = source_ids(data.train)
    return {
        name: (f"data.train.{number}.path", source.path)
        for number, (name, source) in enumerate(zip(ids, data.train, strict=True))
    }


def pack_length(packed: bool, stages: Sequence[Stage], sequence_length: int) -> int | None:
    """Tokens of the packs that documents are read in, where they are packed: those of every stage."""
    return (stages[0].sequence_length if stages else None) or sequence_length if packed else None


def size_of_source(path: str, tokens: int, packed_to: int | None, together: int = 1) -> SourceSize:
    """What the plan must know of a source of so many tokens, of which packs may be read.

    Args:
        together: documents that are never in two packs.
    """
    mark = dataset_fingerprint(path)
    if packed_to is None:
        return SourceSize(tokens, mark)
    # As if the packs stood one after the other in a file, and a token behind them.
    return SourceSize(len(packs_of(path, packed_to, together)) * packed_to + 1, f"{mark}-packed-{packed_to}")


def plan_data(
    data: DataConfig,
    train: TrainConfig,
    sizes: Mapping[str, SourceSize],
    state: TrainingState,
    checkpoint: str | Path,
) -> RunPlan:
    """The plan of a run that goes on from `state`.

    Args:
        sizes: of each source, by id.
        checkpoint: where `state` is from.

    Raises:
        ConfigError: the stages cannot be read from these sources; every fault at once.
        CheckpointError: what was read already is not the beginning of these stages.
    """
    try:
        return make_plan(data, train, sizes, progress_of(data, train, state, checkpoint))
    except CheckpointError as error:
        raise CheckpointError(
            f"{checkpoint}: the run cannot go on with these data:\n{error}\nSet them back, or start a new run from its "
            "weights: another checkpoint.directory, and checkpoint.initialize_from"
        ) from error
    except ConfigError as error:
        key = "data.stages: " if data.stages else ""
        raise ConfigError("\n".join(f"{key}{line}" for line in str(error).splitlines())) from error


def stated_sizes(data: DataConfig) -> dict[str, SourceSize]:
    """Sizes of the sources of which the configuration says how many tokens they will have."""
    return {
        name: SourceSize(round(source.tokens)) for name, source in data.sources.items() if source.tokens is not None
    }


def stated_plan(data: DataConfig, train: TrainConfig) -> RunPlan | None:
    """The plan of a new run by the tokens that the configuration says of its sources; None where it does not of all.

    Raises:
        ConfigError: as `plan_data`.
    """
    sizes = stated_sizes(data)
    if not data.stages or set(sizes) != set(data.sources):
        return None
    return plan_data(data, train, sizes, TrainingState(), "the beginning")


def expected_plan(run: RunConfig) -> RunPlan | None:
    """The plan of a new run by files that are prepared, or else by what the configuration says of their tokens.

    Nothing is checked: tools/train.py --check does. None where there are no stages, a source is known neither way, or
    documents are packed (how many samples that makes takes reading them).

    Raises:
        ConfigError: as `plan_data`.
        DataError: what is prepared does not say how much it is.
    """
    if not run.data.stages or run.data.pack_documents or run.task.reads != "text":
        return stated_plan(run.data, run.train)
    sizes = stated_sizes(run.data)
    for name, source in run.data.sources.items():
        path = Path(source.path)
        if path.with_name(f"{path.name}.bin").is_file() and (path.parent / DATASET_FILE).is_file():
            sizes[name] = SourceSize(described(path.parent / DATASET_FILE, path.name)[1].tokens)
    if set(sizes) != set(run.data.sources):
        return None
    return plan_data(run.data, run.train, sizes, TrainingState(), "the beginning")


def progress_of(data: DataConfig, train: TrainConfig, state: TrainingState, checkpoint: str | Path) -> Progress | None:
    """What a run in `state` has read; None where that is nothing."""
    if not state.consumed_samples:
        return None
    if state.plan is not None:
        progress = from_json(state.plan, Path(checkpoint, STATE_FILE))
        if (progress.steps, progress.samples) != (state.iteration, state.consumed_samples):
            raise CheckpointError(f"{checkpoint}: {STATE_FILE}: the stages read are not the samples consumed")
        return progress
    if data.order == 2:
        raise CheckpointError(
            "  order of samples: by data.cache_dir in the checkpoint, computed in this run; keep data.train and "
            "data.cache_dir as they were"
        )
    # Checkpoints of order 1 know how many samples were read, from which all else follows.
    stage = stages_of(data, train)[0]
    names = list(stage.mix)
    counts = pattern_of(stage, names, {}).counts(state.consumed_samples)
    part = Part(
        stage=stage,
        sequence_length=data.sequence_length,
        global_batch_size=max(state.consumed_samples // max(state.iteration, 1), 1),
        steps=state.iteration,
        samples=state.consumed_samples,
        complete=state.iteration >= train.train_iters,
        offset=0,
        counts=dict(zip(names, counts, strict=True)),
        starts=dict.fromkeys(names, 0),
        skipped={},
    )
    marks = dict.fromkeys(names, "")
    return Progress(1, data.sequence_length, train.seed, marks, dict.fromkeys(names, "shuffled"), (part,), {})


def with_planned_length(run: RunConfig, plan: RunPlan) -> RunConfig:
    """`run` with the number of steps that its stages have."""
    return replace(run, train=replace(run.train, train_iters=plan.total_steps))
