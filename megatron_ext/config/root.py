"""The configuration of a training run: every section, and the rules between them."""

from pydantic import Field

from megatron_ext.config.base import config
from megatron_ext.config.data import DataConfig
from megatron_ext.config.layout import Layout, resolve_layout
from megatron_ext.config.machine import CheckpointConfig, LoggingConfig, RuntimeConfig
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.training import AdamConfig, Precision, RecomputeConfig, Schedule, TrainConfig


@config
class RunConfig:
    """One training run."""

    model: ModelConfig
    """The architecture."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """How it is split over processes."""
    precision: Precision
    """Number formats."""
    train: TrainConfig
    """Length and batches."""
    optimizer: AdamConfig
    """The optimizer."""
    schedule: Schedule
    """The learning rate over the run."""
    recompute: RecomputeConfig = Field(default_factory=RecomputeConfig)
    """Activation recompute."""
    data: DataConfig
    """Training and validation data."""
    checkpoint: CheckpointConfig
    """Where training state is saved and continued from."""
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    """Reports."""
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
    """The machine."""

    def resolve(self, world_size: int) -> Layout:
        """The rank grid of this run on `world_size` processes; ConfigError where there is none."""
        return resolve_layout(self.parallel, self.train, world_size)

    @property
    def planned_samples(self) -> int:
        """Sequences the whole run consumes."""
        return self.train.train_iters * self.train.global_batch_size


DERIVED: dict[str, tuple[str, ...]] = {
    "model": ("head_dim", "rotary_width", "has_dense_layers", "expert_ffn_hidden_size", "padded_vocab_size", "is_moe"),
    "parallel": ("etp",),
}
"""Properties that rules read like keys."""
