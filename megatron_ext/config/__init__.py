"""What a run is: typed, validated, and imported without torch or megatron."""

from megatron_ext.config.attention import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    MultiLatentAttention,
    YarnRopeScaling,
)
from megatron_ext.config.data import Amount, DataConfig, DataSource, Stage, StagedSource
from megatron_ext.config.layout import Layout, Position, smallest_world_size
from megatron_ext.config.load import check_model, load_config, load_run, to_mapping
from megatron_ext.config.machine import CheckpointConfig, LoggingConfig, RuntimeConfig, WandbConfig
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.root import RunConfig
from megatron_ext.config.routing import (
    AdaptiveAuxLoss,
    GatingNormalization,
    GumbelNoise,
    InputJitter,
    LearnedNoise,
)
from megatron_ext.config.schedule import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    Schedule,
    WsdSchedule,
)
from megatron_ext.config.task import PRETRAIN, PretrainTask, SftTask, TaskConfig
from megatron_ext.config.training import (
    AdamConfig,
    Bf16Precision,
    Fp8Precision,
    Fp32Precision,
    Precision,
    RecomputeConfig,
    TrainConfig,
)
from megatron_ext.config.yaml_text import dump_yaml, read_yaml

__all__ = [
    "AdamConfig",
    "AdaptiveAuxLoss",
    "Amount",
    "Bf16Precision",
    "CheckpointConfig",
    "ConstantSchedule",
    "CosineSchedule",
    "DataConfig",
    "DataSource",
    "DynamicRopeScaling",
    "Fp32Precision",
    "Fp8Precision",
    "GatingNormalization",
    "GumbelNoise",
    "InputJitter",
    "Layout",
    "LearnedNoise",
    "LinearRopeScaling",
    "LinearSchedule",
    "Llama3RopeScaling",
    "LoggingConfig",
    "ModelConfig",
    "MultiLatentAttention",
    "ParallelConfig",
    "Position",
    "PRETRAIN",
    "Precision",
    "PretrainTask",
    "RecomputeConfig",
    "RunConfig",
    "RuntimeConfig",
    "Schedule",
    "SftTask",
    "Stage",
    "StagedSource",
    "TaskConfig",
    "TrainConfig",
    "WandbConfig",
    "WsdSchedule",
    "YarnRopeScaling",
    "check_model",
    "dump_yaml",
    "load_config",
    "load_run",
    "read_yaml",
    "smallest_world_size",
    "to_mapping",
]
