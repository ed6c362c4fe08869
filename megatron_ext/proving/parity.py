"""Is a layout equal to one process? The same model, weights and data trained for a few steps in both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_ext.canonical.adapters import adapter_tensors
from megatron_ext.canonical.catalogue import Normal
from megatron_ext.config import (
    PRETRAIN,
    AdamConfig,
    Fp32Precision,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    Precision,
    RecomputeConfig,
    RuntimeConfig,
    TaskConfig,
    TrainConfig,
)
from megatron_ext.config.machine import Backend, Kernels
from megatron_ext.mcore.build import Trainable, build_trainable
from megatron_ext.mcore.initialization import draw_tensors
from megatron_ext.mcore.optimizer import set_learning_rate
from megatron_ext.mcore.rotary import set_rotary_base
from megatron_ext.runtime.device import choose_device
from megatron_ext.runtime.process_groups import Groups, split_process_group
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import SEQUENCE_LENGTH, SOURCES, random_batch
from megatron_ext.training.step import train_step
from megatron_ext.training.tasks.choose import task_of
from megatron_ext.training.tasks.preference import Preference

_ADAPTER_STD = 0.05
_MOST_PAIRS = 4096
"""Of which a table of references is drawn."""


@dataclass(frozen=True)
class Shape:
    """What the steps of a stage have of their own."""

    samples: int
    """Global batch size."""
    micro_batch: int
    length: int
    rotary_base: float
    """Of rotary embedding, where the model has that."""


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
    adam_eps: float = 1e-8
    documents: bool = False
    """Samples hold several documents, and attention stays within them."""
    backend: Backend = "torch"
    kernels: Kernels = "torch"
    compile_router: bool = False
    task: TaskConfig = PRETRAIN
    adapters: LoraConfig | None = None
    """What is trained in place of the weights. Their output halves, zero in a run, begin at random:
    otherwise a fault in the gradient of the others would not show."""
    stages: tuple[Shape, ...] = ()
    """What comes after `steps` of the above, each for as many steps."""

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Of all stages, in order."""
        return Shape(self.samples, self.micro_batch, self.length, self.model.rotary_base), *self.stages

    @property
    def optimizer(self) -> AdamConfig:
        """As a run's section `optimizer`."""
        return AdamConfig(kind="adam", lr=self.lr, adam_eps=self.adam_eps)

    @property
    def train(self) -> TrainConfig:
        """As a run's section `train`."""
        return TrainConfig(
            train_iters=self.steps, global_batch_size=self.samples, micro_batch_size=self.micro_batch, seed=self.seed
        )

    @property
    def runtime(self) -> RuntimeConfig:
        """As a run's section `runtime`."""
        return RuntimeConfig(
            device="cpu",
            threads=1,
            backend=self.backend,
            kernels=self.kernels,
            compile_router=self.compile_router,
        )


@dataclass(frozen=True)
class Trajectory:
    """Loss and gradient norm of each step, and what its sources add to it."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    sources: tuple[tuple[float, float], ...] = ()
    """Loss and units of each source, step after step."""


@dataclass(frozen=True)
class Difference:
    """How far two trajectories are apart, relative to the second."""

    loss: float
    """In all, and of any source."""
    norm: float

    @property
    def worst(self) -> float:
        """The larger of both."""
        return max(self.loss, self.norm)


def build_cell(cell: Cell) -> tuple[Trainable, Groups]:
    """What `cell` trains, as one rank of the process group that is running."""
    device = choose_device(cell.runtime)
    groups = split_process_group(cell.parallel, cell.runtime)
    trainable = build_trainable(cell, groups, device)
    if cell.adapters is not None:
        _begin_at_random(cell, trainable)
    return trainable, groups


def _begin_at_random(cell: Cell, trainable: Trainable) -> None:
    """Draw all of the adapters' tensors, by name as initial weights are."""
    assert cell.adapters is not None
    begin = Normal(0.0, _ADAPTER_STD)
    drawn = {name: replace(one, initial=begin) for name, one in adapter_tensors(cell.model, cell.adapters).items()}
    chunks = list[torch.nn.Module](trainable.chunks)
    draw_tensors(drawn, [p for chunk in chunks for p in chunk.parameters() if p.requires_grad], chunks, cell.seed)
    trainable.optimizer.reload_model_params()


def train_cell(cell: Cell, trainable: Trainable, groups: Groups) -> Trajectory:
    """Train the steps of `cell` on random batches, the same in every layout."""
    set_learning_rate(trainable.optimizer, cell.lr)
    task = task_of(cell.task, cell.model, groups, cell.adapters)
    if isinstance(task, Preference):
        # What the weights say of random tokens, and a little more or less, so that no difference is zero.
        table = -80 + 20 * torch.rand(_MOST_PAIRS, 2, generator=torch.Generator().manual_seed(cell.seed))
        task = replace(task, table=table)
    losses, norms, sources = list[float](), list[float](), list[tuple[float, float]]()
    for step, shape in enumerate(shape for shape in cell.shapes for _ in range(cell.steps)):
        set_rotary_base(trainable.chunks, shape.rotary_base)
        batch = random_batch(
            step,
            samples=shape.samples,
            micro_batch=shape.micro_batch,
            dp_rank=groups.dp.rank(),
            dp_size=groups.dp.size(),
            vocabulary=cell.model.vocab_size,
            length=shape.length,
            documents=cell.documents,
            weighted=cell.task.kind == "sft",
            paired=cell.task.kind == "preference",
        )
        result = train_step(trainable, task, batch, groups, max_norm=cell.optimizer.clip_grad, num_sources=SOURCES)
        losses.append(float(result.loss))
        norms.append(result.grad_norm)
        sources += [(mean, units) for mean, units in result.sources.read() if mean is not None]
    return Trajectory(tuple(losses), tuple(norms), tuple(sources))


def run_cell(cell: Cell) -> Trajectory:
    """Build `cell`, train it and let go of it."""
    trainable, groups = build_cell(cell)
    trajectory = train_cell(cell, trainable, groups)
    trainable.release()
    return trajectory


def run_layout(pool: GlooPool, cell: Cell, world_size: int) -> Trajectory:
    """Train `cell` on `world_size` processes; every rank must report the same."""
    trajectories: Sequence[Trajectory] = pool.run(world_size, run_cell, cell)
    assert all(t == trajectories[0] for t in trajectories), f"ranks report different losses: {trajectories}"
    return trajectories[0]


def compare(measured: Trajectory, reference: Trajectory) -> Difference:
    """Largest relative differences over all steps."""
    return Difference(
        _relative(_losses(measured), _losses(reference)),
        _relative(measured.norms, reference.norms),
    )


def _losses(trajectory: Trajectory) -> list[float]:
    """All that was summed up: the loss, and of each source its loss and the number of its units."""
    return [*trajectory.losses, *(value for source in trajectory.sources for value in source)]


def _relative(measured: Sequence[float], reference: Sequence[float]) -> float:
    differences = [abs(m - r) / abs(r) for m, r in zip(measured, reference, strict=True)]
    # NaN compares false with everything: max() would pass it over.
    return max(differences) if all(map(math.isfinite, differences)) else math.inf
