"""The configuration of a training run: every section, and the rules between them."""

from dataclasses import replace

from pydantic import Field

from megatron_ext.config.adapters import LoraConfig
from megatron_ext.config.alerts import AlertsConfig
from megatron_ext.config.base import config
from megatron_ext.config.data import DataConfig
from megatron_ext.config.evaluation import EvaluationConfig
from megatron_ext.config.guard import GuardConfig
from megatron_ext.config.layout import Layout, StepShape, resolve_layout
from megatron_ext.config.machine import CheckpointConfig, RuntimeConfig
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.reports import LoggingConfig
from megatron_ext.config.schedule import Schedule
from megatron_ext.config.task import PRETRAIN, TaskConfig
from megatron_ext.config.training import AdamConfig, Precision, RecomputeConfig, TrainConfig


@config
class RunConfig:
    """One training run."""

    model: ModelConfig
    """The architecture."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """How it is split over processes."""
    adapters: LoraConfig | None = None
    """Low-rank adapters, trained in place of the weights. Unset: all weights are trained."""
    precision: Precision
    """Number formats."""
    train: TrainConfig
    """Length and batches."""
    task: TaskConfig = Field(default_factory=lambda: PRETRAIN)
    """What is trained, on which kind of data."""
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
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """What looks at each checkpoint while the run goes on."""
    guard: GuardConfig = Field(default_factory=GuardConfig)
    """Steps that go wrong."""
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    """Reports."""
    alerts: AlertsConfig = Field(default_factory=AlertsConfig)
    """Who is told of what happens."""
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
    """The machine."""

    def resolve(self, world_size: int) -> Layout:
        """The rank grid of this run on `world_size` processes; ConfigError where there is none."""
        return resolve_layout(self.parallel, self.train, world_size, self.step_shapes)

    @property
    def step_shapes(self) -> list[StepShape]:
        """What the steps of the run are like: of the ramp, then of each stage, or of the run where it has none."""
        train, shapes = self.train, list[StepShape]()
        usual = StepShape(
            "train.global_batch_size",
            train.global_batch_size,
            "train.micro_batch_size",
            train.micro_batch_size,
            self.data.sequence_length,
            self.model.rotary_base,
        )
        for number, stage in enumerate(self.data.stages):
            key, shape = f"data.stages.{number}", replace(usual, stage=stage.name)
            if stage.global_batch_size is not None:
                shape = replace(shape, key=f"{key}.global_batch_size", size=stage.global_batch_size)
            if stage.micro_batch_size is not None:
                shape = replace(shape, micro_key=f"{key}.micro_batch_size", micro_size=stage.micro_batch_size)
            length, base = stage.sequence_length or usual.length, stage.rotary_base or usual.rotary_base
            shapes.append(replace(shape, length=length, rotary_base=base))
        shapes = shapes or [usual]
        ramp = [
            replace(shapes[0], key=f"train.batch_size_ramp.{number}.global_batch_size", size=step.global_batch_size)
            for number, step in enumerate(train.batch_size_ramp)
        ]
        return ramp + shapes

    @property
    def planned_samples(self) -> int:
        """Sequences the whole run consumes, where it has no stages."""
        train = self.train
        ramp = sum(
            step.num_steps * (step.global_batch_size - train.global_batch_size) for step in train.batch_size_ramp
        )
        return train.train_iters * train.global_batch_size + ramp

    @property
    def step_tokens(self) -> set[int]:
        """How many tokens an optimizer step has; several where stages or a batch-size ramp differ in that."""
        return {shape.size * shape.length for shape in self.step_shapes}


DERIVED: dict[str, tuple[str, ...]] = {
    "model": ("head_dim", "rotary_width", "has_dense_layers", "expert_ffn_hidden_size", "padded_vocab_size", "is_moe"),
    "parallel": ("etp", "counted_as_layers", "flex_backend"),
}
"""Properties that rules read like keys."""
