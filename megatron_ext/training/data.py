"""The data streams of a run, opened and checked before its model is built."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ext.checkpoint.state_file import TrainingState
from megatron_ext.config import DataSource, RunConfig
from megatron_ext.data.dataset import dataset_fingerprint
from megatron_ext.data.stream.batches import DocumentResets
from megatron_ext.data.stream.sources import build_blend
from megatron_ext.data.stream.stream import BatchShape, BlendStream, DataStream
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import DataError
from megatron_ext.training.same_run import check_same_sources


@dataclass(frozen=True)
class RunData:
    """What a run reads."""

    train: DataStream
    validation: DataStream | None
    """None where the run never validates."""
    fingerprints: tuple[str, ...]
    """Of each training source: positions in `train` count samples of these."""

    def close(self) -> None:
        """End what reads ahead, also where the run failed: its processes would keep this one from ending."""
        for stream in (self.train, self.validation):
            if stream is not None:
                stream.close()


def open_data(run: RunConfig, state: TrainingState, dp: dist.ProcessGroup, device: torch.device) -> RunData:
    """Open the streams of `run`, which goes on from `state`. Every rank must call this.

    Args:
        dp: the ranks that read different samples.

    Raises:
        DataError: a source is missing, damaged or too short, or the model has no rows for some tokens.
        CheckpointError: the sources are not those in which `state` counts its samples.
    """
    data, train = run.data, run.train
    tokenizer = Tokenizer(data.tokenizer)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise DataError(
            f"{data.tokenizer} makes token ids up to {tokenizer.vocab_size - 1}, more than "
            f"model.vocab_size = {run.model.vocab_size}; set that to {tokenizer.vocab_size} or more"
        )
    resets = None
    if data.reset_attention_mask or data.reset_position_ids:
        resets = DocumentResets(tokenizer.eod, data.reset_attention_mask, data.reset_position_ids)
    shape = BatchShape(train.global_batch_size, train.micro_batch_size, dp.rank(), dp.size())

    def opened(sources: Sequence[DataSource], num_samples: int, seed: int) -> DataStream:
        blend = build_blend(sources, data, tokenizer, num_samples=num_samples, seed=seed)
        # What is drawn for a sample is the run's own in validation too.
        return BlendStream(blend, shape, seed=train.seed, device=device, num_workers=data.num_workers, resets=resets)

    # The batch size may have changed on the way: what is left counts in today's, what is done is what it was.
    remaining = max(train.train_iters - state.iteration, 0) * train.global_batch_size
    stream = opened(data.train, state.consumed_samples + remaining, train.seed)
    fingerprints = tuple(dataset_fingerprint(source.path) for source in data.train)
    check_same_sources(fingerprints, state, run.checkpoint.directory)
    validation = None
    if train.eval_interval is not None:
        # Whatever a run's seed is, it is validated on the same samples: losses of different runs can be compared.
        validation = opened(data.validation, train.eval_iters * train.global_batch_size, 0)
    return RunData(stream, validation, fingerprints)
