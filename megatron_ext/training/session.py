"""Everything a run has in its hands while it trains: model, optimizer, data, groups; how they are saved and loaded."""

import dataclasses
import logging
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.checkpoint.find import find_checkpoint, require_checkpoint
from megatron_ext.checkpoint.integrity import require_whole_together
from megatron_ext.checkpoint.load import fill_shards, load_shards
from megatron_ext.checkpoint.manager import CheckpointManager, RankState
from megatron_ext.checkpoint.state_file import TrainingState, read_state
from megatron_ext.config import DataSource, Layout, RunConfig, to_mapping
from megatron_ext.data.batches import DocumentResets, MicroBatch
from megatron_ext.data.datasets import build_blend, read_batches
from megatron_ext.data.preprocess import dataset_fingerprint
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import DataError, TrainingError
from megatron_ext.mcore.initialization import initialize_weights
from megatron_ext.mcore.model import build_chunks, gather_parameters, release_chunks, routers, wrap_chunks
from megatron_ext.mcore.moe.metrics import ExpertStatistics, collect_statistics
from megatron_ext.mcore.moe.router import require_directions
from megatron_ext.mcore.optimizer import build_optimizer, optimizer_steps, set_optimizer_steps
from megatron_ext.mcore.state import amax_shards, coefficient_shards, model_shards, optimizer_shards
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.model_io.open import is_hugging_face, open_checkpoint, with_padding
from megatron_ext.model_io.streamed_shards import StreamedShards
from megatron_ext.monitoring.wandb_run import new_run_id
from megatron_ext.runtime.process_groups import Groups
from megatron_ext.runtime.seeds import random_state, restore_random_state, seed_everything
from megatron_ext.training.same_run import (
    check_models_agree,
    check_same_data,
    check_same_model,
    check_same_sources,
    with_vocabulary_padding,
)
from megatron_ext.training.step import StepResult, prepare_for_training, train_step, validation_loss

log = logging.getLogger(__name__)


@dataclass
class Session:
    """One rank's part of a run. Built by `open_session`, after the process groups are."""

    run: RunConfig
    layout: Layout
    groups: Groups
    device: torch.device
    chunks: list[Any]
    """Model chunks as built; their weights are what is saved."""
    wrapped: list[Any]
    """The same chunks wrapped for training."""
    optimizer: Any
    state: TrainingState
    checkpoints: CheckpointManager
    reported: int = 0
    """Step of the last report, and steps passed over since: what is reported averages over the steps trained since."""
    wandb_run_id: str = field(default_factory=new_run_id)
    """The W&B run to continue."""

    def __post_init__(self) -> None:
        self._register_states()

    def step(self, batch: list[MicroBatch], asks_to_stop: Callable[[], bool] = lambda: False) -> StepResult:
        """Train on one global batch and advance the position. TrainingError where the gradient is not finite."""
        max_norm = self.run.optimizer.clip_grad
        try:
            result = train_step(
                self.wrapped, self.optimizer, batch, self.groups, max_norm=max_norm, asks_to_stop=asks_to_stop
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
        return self.checkpoints.save(self.state.iteration)

    def resume(self, checkpoint: Path) -> None:
        """Continue from `checkpoint`, saved in any layout."""
        check_same_model(self.run.model, checkpoint)
        if read_state(checkpoint).consumed_samples:
            check_same_data(self.run.data, self.run.train, checkpoint)
        if self.run.checkpoint.load_optimizer:
            self.checkpoints.restore(checkpoint)
        else:
            self.checkpoints.restore(checkpoint, only=("model", "progress", "wandb"))
            self._take_over_weights()
        layout = "" if self.checkpoints.has_layout_of(checkpoint) else ", in another layout"
        log.info("continuing %s at step %d%s", checkpoint, self.state.iteration, layout)

    def initialize_from(self, path: str | Path) -> None:
        """Take the weights at `path`, a Megatron checkpoint or a Hugging Face directory, and start at step 0."""
        shards = self.checkpoints.tensors(only=["model"])
        if is_hugging_face(path):
            opened = open_checkpoint(path)
            checkpoint, model = opened.directory, with_vocabulary_padding(opened.model, self.run.model)
            check_models_agree(self.run.model, model, checkpoint)
            require_whole_together(checkpoint)
            reader = StreamedShards(with_padding(opened, model.padded_vocab_size))
            fill_shards(reader, checkpoint, shards)
        else:
            checkpoint = require_checkpoint(path)
            check_same_model(self.run.model, checkpoint)
            load_shards(checkpoint, shards)
        self._take_over_weights()
        log.info("weights from %s", checkpoint)

    def close(self) -> None:
        """Let go of model and groups, in a process that goes on; the session is of no use afterwards."""
        release_chunks(self.wrapped)

    def _take_over_weights(self) -> None:
        """Give the optimizer's fp32 weights the value of the model's."""
        self.optimizer.reload_model_params()

    def _register_states(self) -> None:
        """Say what a checkpoint of this run holds."""
        register = self.checkpoints.register
        register("model", tensors=lambda: model_shards(self.chunks))
        register(
            "optimizer",
            tensors=lambda: optimizer_shards(self.chunks, self.optimizer),
            scalars=lambda: {"optimizer_steps": optimizer_steps(self.optimizer)},
            restore=lambda saved: set_optimizer_steps(self.optimizer, saved["optimizer_steps"]),
        )
        register("router_coefficients", tensors=lambda: coefficient_shards(routers(self.chunks)))
        register("fp8_histories", tensors=lambda: amax_shards(self.chunks))
        register("progress", scalars=self._progress, restore=self._restore_progress)
        register("wandb", scalars=lambda: {"wandb_run_id": self.wandb_run_id}, restore=self._restore_wandb)

    def _progress(self) -> dict[str, Any]:
        state = self.state
        return {"iteration": state.iteration, "consumed_samples": state.consumed_samples, "data": state.data}

    def _restore_progress(self, saved: Mapping[str, Any]) -> None:
        self.state = TrainingState(saved["iteration"], saved["consumed_samples"], data=tuple(saved["data"]))

    def _restore_wandb(self, saved: Mapping[str, Any]) -> None:
        if not isinstance(run_id := saved.get("wandb_run_id"), str | None):
            raise ValueError(f"wandb_run_id is {run_id!r}")
        self.wandb_run_id = run_id or new_run_id()


def starting_state(run: RunConfig) -> TrainingState:
    """Where a run will go on: the state of its newest checkpoint, or the beginning."""
    newest = find_checkpoint(run.checkpoint.directory)
    return read_state(newest) if newest is not None else TrainingState()


def open_session(run: RunConfig, layout: Layout, groups: Groups, device: torch.device) -> Session:
    """Build the model and optimizer with fresh weights, or those that the run continues or starts from."""
    seed_everything(run.train.seed)
    config = transformer_config(run.model, run.parallel, run.precision, run.recompute, run.runtime.backend)
    chunks = build_chunks(run.model, run.parallel, config, device)
    initialize_weights(run.model, list(chunks), run.train.seed)
    wrapped = wrap_chunks(chunks, config, run.parallel)
    optimizer = build_optimizer(run.optimizer, run.parallel, run.precision, wrapped)
    prepare_for_training(config, wrapped, overlap_grad_reduce=run.parallel.overlap_grad_reduce)
    checkpoints = checkpoint_manager(run, device)
    session = Session(run, layout, groups, device, list(chunks), wrapped, optimizer, TrainingState(), checkpoints)
    if (checkpoint := checkpoints.newest()) is not None:
        session.resume(checkpoint)
    elif run.checkpoint.initialize_from is not None:
        session.initialize_from(run.checkpoint.initialize_from)
    require_directions(routers(chunks))
    session.reported = session.state.iteration
    return session


def checkpoint_manager(run: RunConfig, device: torch.device) -> CheckpointManager:
    """What saves and restores the checkpoints of `run`; nothing is registered yet."""
    return CheckpointManager(
        run.checkpoint.directory,
        to_mapping(run),
        tokenizer=Path(run.data.tokenizer),
        keep_last=run.checkpoint.keep_last,
        rank_state=RankState(lambda: random_state(device), lambda saved: restore_random_state(saved, device)),
    )


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
