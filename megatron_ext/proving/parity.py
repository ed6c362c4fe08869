"""Is a layout equal to one process? The same model, weights and data trained for a few steps in both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.config import (
    AdamConfig,
    Fp32Precision,
    ModelConfig,
    ParallelConfig,
    Precision,
    RecomputeConfig,
    RuntimeConfig,
)
from megatron_ext.mcore.initialization import initialize_weights
from megatron_ext.mcore.model import build_chunks, release_chunks, wrap_chunks
from megatron_ext.mcore.optimizer import build_optimizer, set_learning_rate
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.runtime.device import choose_device
from megatron_ext.runtime.process_groups import Groups, split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import SEQUENCE_LENGTH, random_batch
from megatron_ext.training.step import prepare_for_training, train_step


@dataclass(frozen=True)
class Cell:
    """One training in one layout."""

    model: ModelConfig
    parallel: ParallelConfig
    precision: Precision = Fp32Precision(kind="fp32")
    recompute: RecomputeConfig = RecomputeConfig()
    steps: int = 5
    samples: int = 8
    """Global batch size."""
    micro_batch: int = 1
    length: int = SEQUENCE_LENGTH
    seed: int = 1234
    lr: float = 1e-3
    documents: bool = False
    """Samples hold several documents, and attention stays within them."""


@dataclass(frozen=True)
class Trajectory:
    """Loss and gradient norm of each step."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """How far two trajectories are apart, relative to the second."""

    loss: float
    norm: float

    @property
    def worst(self) -> float:
        """The larger of both."""
        return max(self.loss, self.norm)


def run_cell(cell: Cell) -> Trajectory:
    """Train `cell` as one rank of the process group that is running."""
    runtime = RuntimeConfig(device="cpu", threads=1)
    device = choose_device(runtime)
    groups: Groups = split_process_group(cell.parallel, runtime)
    seed_everything(cell.seed)
    config = transformer_config(cell.model, cell.parallel, cell.precision, cell.recompute)
    chunks = build_chunks(cell.model, cell.parallel, config, device)
    initialize_weights(cell.model, list(chunks), cell.seed)
    wrapped = wrap_chunks(chunks, config, cell.parallel)
    adam = AdamConfig(kind="adam", lr=cell.lr)
    optimizer = build_optimizer(adam, cell.parallel, cell.precision, wrapped)
    prepare_for_training(config, wrapped, overlap_grad_reduce=cell.parallel.overlap_grad_reduce)
    set_learning_rate(optimizer, adam.lr)
    losses, norms = [], []
    for step in range(cell.steps):
        batch = random_batch(
            step,
            samples=cell.samples,
            micro_batch=cell.micro_batch,
            dp_rank=groups.dp.rank(),
            dp_size=groups.dp.size(),
            vocabulary=cell.model.vocab_size,
            length=cell.length,
            documents=cell.documents,
        )
        result = train_step(wrapped, optimizer, batch, groups, max_norm=adam.clip_grad)
        losses.append(float(result.loss))
        norms.append(result.grad_norm)
    release_chunks(wrapped)
    return Trajectory(tuple(losses), tuple(norms))


def run_layout(pool: GlooPool, cell: Cell, world_size: int) -> Trajectory:
    """Train `cell` on `world_size` processes; every rank must report the same."""
    trajectories: Sequence[Trajectory] = pool.run(world_size, run_cell, cell)
    assert all(t == trajectories[0] for t in trajectories), f"ranks report different losses: {trajectories}"
    return trajectories[0]


def compare(measured: Trajectory, reference: Trajectory) -> Difference:
    """Largest relative differences over all steps."""
    return Difference(_relative(measured.losses, reference.losses), _relative(measured.norms, reference.norms))


def _relative(measured: Sequence[float], reference: Sequence[float]) -> float:
    differences = [abs(m - r) / abs(r) for m, r in zip(measured, reference, strict=True)]
    # NaN compares false with everything: max() would pass it over.
    return max(differences) if all(map(math.isfinite, differences)) else math.inf
