"""What a run is: typed, validated, and imported without torch or megatron."""

from megatron_ext.config.data import DataConfig, DataSource
from megatron_ext.config.layout import Layout, Position, smallest_world_size
from megatron_ext.config.load import check_model, load_config, load_run, to_mapping
from megatron_ext.config.model import GatingNormalization, ModelConfig
from megatron_ext.config.output import CheckpointConfig, LoggingConfig, RuntimeConfig, WandbConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.root import RunConfig
from megatron_ext.config.training import (
    AdamConfig,
    Bf16Precision,
    ConstantSchedule,
    CosineSchedule,
    Fp32Precision,
    LinearSchedule,
    Precision,
    RecomputeConfig,
    Schedule,
    TrainConfig,
    WsdSchedule,
)
from megatron_ext.config.yaml_text import dump_yaml, read_yaml

__all__ = [
    "AdamConfig",
    "Bf16Precision",
    "CheckpointConfig",
    "ConstantSchedule",
    "CosineSchedule",
    "DataConfig",
    "DataSource",
    "Fp32Precision",
    "GatingNormalization",
    "Layout",
    "LinearSchedule",
    "LoggingConfig",
    "ModelConfig",
    "ParallelConfig",
    "Position",
    "Precision",
    "RecomputeConfig",
    "RunConfig",
    "RuntimeConfig",
    "Schedule",
    "TrainConfig",
    "WandbConfig",
    "WsdSchedule",
    "check_model",
    "dump_yaml",
    "load_config",
    "load_run",
    "read_yaml",
    "smallest_world_size",
    "to_mapping",
]
