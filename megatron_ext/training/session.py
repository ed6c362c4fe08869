"""Everything a run has in its hands while it trains: model, optimizer, data, groups; how they are saved and loaded."""

import dataclasses
import logging
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.checkpoint import store
from megatron_ext.checkpoint.shards import TensorShard
from megatron_ext.checkpoint.store import TrainingState
from megatron_ext.config import DataSource, Layout, RunConfig, to_mapping
from megatron_ext.data.batches import DocumentResets, MicroBatch
from megatron_ext.data.datasets import build_blend, read_batches
from megatron_ext.data.preprocess import dataset_fingerprint
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import CheckpointError, DataError, TrainingError
from megatron_ext.foreign import reading
from megatron_ext.mcore.build import Trainable, build_trainable
from megatron_ext.mcore.model import gather_parameters, routers
from megatron_ext.mcore.moe.metrics import ExpertStatistics, collect_statistics
from megatron_ext.mcore.moe.router import require_directions
from megatron_ext.mcore.optimizer import optimizer_steps, set_optimizer_steps
from megatron_ext.mcore.state import model_shards, optimizer_shards
from megatron_ext.model_io.open import is_hugging_face, open_checkpoint, with_padding
from megatron_ext.model_io.streamed_shards import StreamedShards
from megatron_ext.monitoring.wandb_run import new_run_id
from megatron_ext.runtime.process_groups import Groups
from megatron_ext.runtime.seeds import random_state, restore_random_state
from megatron_ext.training.same_run import (
    check_models_agree,
    check_same_data,
    check_same_model,
    check_same_sources,
    with_vocabulary_padding,
)
from megatron_ext.training.step import StepResult, train_step, validation_loss

log = logging.getLogger(__name__)


@dataclass
class Session:
    """One rank's part of a run. Built by `open_session`, after the process groups are."""

    run: RunConfig
    layout: Layout
    groups: Groups
    device: torch.device
    trainable: Trainable
    state: TrainingState
    reported: int = 0
    """Step of the last report, and steps passed over since: what is reported averages over the steps trained since."""

    @property
    def chunks(self) -> list[Any]:
        """Model chunks as built; their weights are what is saved."""
        return list(self.trainable.chunks)

    @property
    def wrapped(self) -> list[Any]:
        """The same chunks wrapped for training."""
        return self.trainable.wrapped

    @property
    def optimizer(self) -> Any:
        """The optimizer of this rank's parameters."""
        return self.trainable.optimizer

    def step(self, batch: list[MicroBatch], asks_to_stop: Callable[[], bool] = lambda: False) -> StepResult:
        """Train on one global batch and advance the position. TrainingError where the gradient is not finite."""
        max_norm = self.run.optimizer.clip_grad
        try:
            result = train_step(
                self.wrapped,
                self.optimizer,
                batch,
                self.groups,
                participants=self.trainable.participants,
                max_norm=max_norm,
                asks_to_stop=asks_to_stop,
            )
        except TrainingError as error:
            raise TrainingError(f"step {self.state.iteration + 1}: {error}") from error
        self._advance()
        return result

    def skips_next(self) -> bool:
        """Whether the configuration says to pass over the next step."""
        step = self.state.iteration + 1
        return any(first <= step <= last for first, last in self.run.train.skip_steps)

    def pass_over(self) -> None:
        """Advance the position by one step without training on its samples."""
        self._advance()
        self.reported += 1

    def _advance(self) -> None:
        self.state = dataclasses.replace(
            self.state,
            iteration=self.state.iteration + 1,
            consumed_samples=self.state.consumed_samples + self.run.train.global_batch_size,
            optimizer_steps=optimizer_steps(self.optimizer),
        )

    def validate(self, batches: Iterator[list[MicroBatch]]) -> float:
        """Loss a token over `batches`."""
        return float(validation_loss(self.wrapped, batches, self.groups))

    def expert_statistics(self, steps: int) -> ExpertStatistics | None:
        """Routing over the last `steps` steps; None in a dense model."""
        if not self.run.model.is_moe:
            return None
        assert self.run.model.num_moe_experts is not None
        return collect_statistics(
            routers(self.chunks),
            num_layers=self.run.model.num_layers,
            num_experts=self.run.model.num_moe_experts,
            num_microbatches=steps * self.layout.num_microbatches * self.layout.dp,
            group=self.groups.world,
            device=self.device,
        )

    def peak_memory(self) -> int:
        """Bytes used at most by the rank that used most: device memory on CUDA, resident memory on CPU."""
        if self.device.type == "cuda":
            used = torch.cuda.max_memory_allocated()
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        most = torch.tensor(float(used), device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.groups.world)
        return int(most)

    def save(self) -> Path:
        """Save a checkpoint."""
        gather_parameters(self.wrapped, self.run.parallel)
        return store.save_checkpoint(
            self.run.checkpoint.directory,
            self._shards(with_optimizer=True),
            self.state,
            to_mapping(self.run),
            random_state(self.device),
            tokenizer=Path(self.run.data.tokenizer),
            keep_last=self.run.checkpoint.keep_last,
        )

    def resume(self, checkpoint: Path) -> None:
        """Continue from `checkpoint`, saved in any layout."""
        check_same_model(self.run.model, checkpoint)
        state = store.read_state(checkpoint)
        if state.consumed_samples:
            check_same_data(self.run.data, self.run.train, checkpoint)
        with_optimizer = self.run.checkpoint.load_optimizer
        store.load_shards(checkpoint, self._shards(with_optimizer))
        self.state = state
        if with_optimizer:
            set_optimizer_steps(self.optimizer, self.state.optimizer_steps)
        else:
            self._take_over_weights()
        same_layout = store.read_run(checkpoint).get("parallel") == to_mapping(self.run.parallel)
        saved = store.read_random_state(checkpoint, dist.get_rank()) if same_layout else None
        if saved is not None:
            with reading(checkpoint / store.RNG_FILE, CheckpointError):
                restore_random_state(saved, self.device)
        log.info(
            "continuing %s at step %d%s", checkpoint, self.state.iteration, "" if same_layout else ", in another layout"
        )

    def initialize_from(self, path: str | Path) -> None:
        """Take the weights at `path`, a Megatron checkpoint or a Hugging Face directory, and start at step 0."""
        shards = self._shards(with_optimizer=False)
        if is_hugging_face(path):
            opened = open_checkpoint(path)
            checkpoint, model = opened.directory, with_vocabulary_padding(opened.model, self.run.model)
            check_models_agree(self.run.model, model, checkpoint)
            store.require_whole_together(checkpoint)
            reader = StreamedShards(with_padding(opened, model.padded_vocab_size))
            store.fill_shards(reader, checkpoint, shards)
        else:
            checkpoint = store.require_checkpoint(path)
            check_same_model(self.run.model, checkpoint)
            store.load_shards(checkpoint, shards)
        self._take_over_weights()
        log.info("weights from %s", checkpoint)

    def close(self) -> None:
        """Let go of model and groups, in a process that goes on; the session is of no use afterwards."""
        self.trainable.release()

    def _take_over_weights(self) -> None:
        """Give the optimizer's fp32 weights the value of the model's."""
        self.optimizer.reload_model_params()

    def _shards(self, with_optimizer: bool) -> list[TensorShard]:
        if not with_optimizer:
            return model_shards(self.chunks)
        followed = [shard for participant in self.trainable.participants for shard in participant.state()]
        return model_shards(self.chunks) + optimizer_shards(self.chunks, self.optimizer) + followed


def starting_state(run: RunConfig) -> TrainingState:
    """Where a run will go on: the state of its newest checkpoint, or the beginning."""
    newest = store.find_checkpoint(run.checkpoint.directory)
    return store.read_state(newest) if newest is not None else TrainingState()


def open_session(run: RunConfig, layout: Layout, groups: Groups, device: torch.device) -> Session:
    """Build the model and optimizer with fresh weights, or those that the run continues or starts from."""
    session = Session(run, layout, groups, device, build_trainable(run, groups, device), TrainingState())
    if (checkpoint := store.find_checkpoint(run.checkpoint.directory)) is not None:
        session.resume(checkpoint)
    elif run.checkpoint.initialize_from is not None:
        session.initialize_from(run.checkpoint.initialize_from)
    require_directions(routers(session.chunks))
    session.reported = session.state.iteration
    if session.state.wandb_run_id is None:
        session.state = dataclasses.replace(session.state, wandb_run_id=new_run_id())
    return session


class RunData:
    """The training and validation samples of a run."""

    def __init__(self, run: RunConfig, state: TrainingState) -> None:
        self._run = run
        self._tokenizer = Tokenizer(run.data.tokenizer)
        if self._tokenizer.vocab_size > run.model.vocab_size:
            raise DataError(
                f"{run.data.tokenizer} makes token ids up to {self._tokenizer.vocab_size - 1}, more than "
                f"model.vocab_size = {run.model.vocab_size}; set that to {self._tokenizer.vocab_size} or more"
            )
        data = run.data
        self._resets = None
        if data.reset_attention_mask or data.reset_position_ids:
            self._resets = DocumentResets(self._tokenizer.eod, data.reset_attention_mask, data.reset_position_ids)
        # The batch size may have changed on the way: what is left counts in today's, what is done is what it was.
        remaining = max(run.train.train_iters - state.iteration, 0) * run.train.global_batch_size
        self._train = self._blend(run.data.train, state.consumed_samples + remaining, run.train.seed)
        self.fingerprints = tuple(dataset_fingerprint(source.path) for source in run.data.train)
        check_same_sources(self.fingerprints, state, run.checkpoint.directory)
        self._validation = None
        if run.train.eval_interval is not None:
            # Whatever a run's seed is, it is validated on the same samples: losses of different runs can be compared.
            self._validation = self._blend(
                run.data.validation, run.train.eval_iters * run.train.global_batch_size, seed=0
            )

    def _blend(self, sources: list[DataSource], num_samples: int, seed: int) -> Any:
        return build_blend(sources, self._run.data, self._tokenizer, num_samples=num_samples, seed=seed)

    def train(self, session: Session) -> Iterator[list[MicroBatch]]:
        """The rest of the run, from the session's position on."""
        steps = self._run.train.train_iters - session.state.iteration
        return self._read(self._train, session, session.state.consumed_samples, steps)

    def validation(self, session: Session) -> Iterator[list[MicroBatch]]:
        """The validation batches: the same ones every time."""
        return self._read(self._validation, session, 0, self._run.train.eval_iters)

    def _read(self, dataset: Any, session: Session, first_sample: int, steps: int) -> Iterator[list[MicroBatch]]:
        return read_batches(
            dataset,
            seed=self._run.train.seed,
            first_sample=first_sample,
            steps=steps,
            global_batch=self._run.train.global_batch_size,
            micro_batch=self._run.train.micro_batch_size,
            dp_rank=session.groups.dp.rank(),
            dp_size=session.groups.dp.size(),
            num_workers=self._run.data.num_workers,
            device=session.device,
            resets=self._resets,
        )
