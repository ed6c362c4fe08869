"""The data streams of a run, opened and checked before its model is built."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ext.checkpoint.state_file import TrainingState
from megatron_ext.config import DataSource, PreferenceTask, RunConfig, SftTask
from megatron_ext.data.stream.batches import DocumentResets
from megatron_ext.data.stream.chat import chat_samples, chat_size, chat_validation, pair_samples, validation_plan
from megatron_ext.data.stream.pairs import first_pairs
from megatron_ext.data.stream.plan import RunPlan
from megatron_ext.data.stream.sources import build_blend, planned_samples, source_size
from megatron_ext.data.stream.stream import BatchShape, BlendStream, DataStream, PlannedShapes, Samples, ShapeOfBatches
from megatron_ext.data.supervised import PIECES, number_of_pairs
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import DataError
from megatron_ext.training.planned import pack_length, plan_data, size_of_source, source_paths
from megatron_ext.training.same_run import check_same_sources


@dataclass(frozen=True)
class RunData:
    """What a run reads."""

    train: DataStream
    validation: DataStream | None
    """None where the run never validates."""
    fingerprints: tuple[str, ...]
    """Of each training source: positions in `train` count samples of these."""
    plan: RunPlan
    """Which stage each step belongs to, and how much of each source has been read at any point."""

    def close(self) -> None:
        """End what reads ahead, also where the run failed: its processes would keep this one from ending."""
        for stream in (self.train, self.validation):
            if stream is not None:
                stream.close()


def open_data(run: RunConfig, state: TrainingState, dp: dist.ProcessGroup, device: torch.device) -> RunData:
    """Open the streams of `run`, which goes on from `state`. With data.cache_dir, rank 0 has to be the first.

    Args:
        dp: the ranks that read different samples.

    Raises:
        DataError: a source is missing, damaged or too short, or the model has no rows for some tokens.
        CheckpointError: the sources are not those in which `state` counts its samples.
    """
    data, train = run.data, run.train
    tokenizer = _tokenizer_of(run)
    resets = None
    if data.reset_attention_mask or data.reset_position_ids:
        resets = DocumentResets(tokenizer.eod, data.reset_attention_mask, data.reset_position_ids)
    named = source_paths(data)
    packed_to = pack_length(data.pack_documents or run.task.reads != "text", data.stages, data.sequence_length)
    sizes = {
        name: size_of_source(path, _tokens_of(run, path, tokenizer, key), packed_to, PIECES[run.task.reads])
        for name, (key, path) in named.items()
    }
    plan = plan_data(data, train, sizes, state, run.checkpoint.directory)

    def opened(samples: Samples, shape: ShapeOfBatches) -> DataStream:
        # What is drawn for a sample is the run's own in validation too.
        return BlendStream(samples, shape, seed=train.seed, device=device, num_workers=data.num_workers, resets=resets)

    stream = opened(_samples_of(run, plan, tokenizer), PlannedShapes(plan, dp.rank(), dp.size()))
    fingerprints = tuple(size.fingerprint for size in sizes.values())
    if data.order == 1:
        check_same_sources(fingerprints, state, run.checkpoint.directory)
    validation = None
    if train.eval_interval is not None:
        # Whatever a run's seed is, it is validated on the same samples: losses of different runs can be compared.
        shape = BatchShape(train.global_batch_size, train.micro_batch_size, dp.rank(), dp.size())
        validation = opened(
            _drawn(run, data.validation, tokenizer, train.eval_iters * train.global_batch_size, 0), shape
        )
    return RunData(stream, validation, fingerprints, plan)


def _samples_of(run: RunConfig, plan: RunPlan, tokenizer: Tokenizer) -> Samples:
    """What `run` trains on, by `plan`."""
    data = run.data
    if data.order == 1:
        return _drawn(run, data.train, tokenizer, plan.total_samples, run.train.seed)
    paths = {name: path for name, (_, path) in source_paths(data).items()}
    if isinstance(run.task, SftTask):
        return chat_samples(plan, paths, tokenizer, run.task.weighting)
    if isinstance(run.task, PreferenceTask):
        return pair_samples(plan, paths, tokenizer, pairs_of_run(run))
    return planned_samples(plan, paths, data, tokenizer, packed=data.pack_documents)


def _drawn(run: RunConfig, sources: Sequence[DataSource], tokenizer: Tokenizer, number: int, seed: int) -> Samples:
    """So many samples drawn from `sources` by weight; chat data and pairs are the same for every seed."""
    if isinstance(run.task, SftTask):
        return chat_validation(sources, run.data, tokenizer, run.task.weighting, number)
    if isinstance(run.task, PreferenceTask):
        plan, paths = validation_plan(sources, run.data, tokenizer, "preference", number)
        return pair_samples(plan, paths, tokenizer, pairs_of_run(run))
    return build_blend(sources, run.data, tokenizer, num_samples=number, seed=seed)


def pairs_of_run(run: RunConfig) -> dict[str, int]:
    """The number of the first pair of each prepared dataset of `run`, by its path, among all that it reads."""
    paths = [path for _, path in source_paths(run.data).values()]
    if run.train.eval_interval is not None:
        paths += [source.path for source in run.data.validation]
    return first_pairs({path: number_of_pairs(path) for path in paths}, paths)


def _tokens_of(run: RunConfig, path: str, tokenizer: Tokenizer, key: str) -> int:
    """Tokens of the source at `path`, which `key` names, once it is what the task reads."""
    if run.task.reads != "text":
        length = pack_length(True, run.data.stages, run.data.sequence_length)
        return chat_size(path, tokenizer, length or run.data.sequence_length, key, run.task.reads).tokens
    return source_size(path, tokenizer, key).tokens


def _tokenizer_of(run: RunConfig) -> Tokenizer:
    """The tokenizer of the data, once the model has a row for each of its tokens."""
    tokenizer = Tokenizer(run.data.tokenizer)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise DataError(
            f"{run.data.tokenizer} makes token ids up to {tokenizer.vocab_size - 1}, more than "
            f"model.vocab_size = {run.model.vocab_size}; set that to {tokenizer.vocab_size} or more"
        )
    return tokenizer
