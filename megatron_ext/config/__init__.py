"""What a run is: typed, validated, and imported without torch or megatron."""

from megatron_ext.config.adapters import LoraConfig, LoraTarget
from megatron_ext.config.alerts import AlertsConfig, EmailConfig, WebhookConfig
from megatron_ext.config.attention import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    MultiLatentAttention,
    YarnRopeScaling,
)
from megatron_ext.config.data import Amount, DataConfig, DataSource, Stage, StagedSource
from megatron_ext.config.evaluation import EvaluationConfig
from megatron_ext.config.guard import GuardConfig, RollbackConfig, SpikeConfig
from megatron_ext.config.layout import Layout, Position, smallest_world_size
from megatron_ext.config.load import check_model, load_config, load_run, to_mapping
from megatron_ext.config.machine import CheckpointConfig, RuntimeConfig, WatchdogConfig
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.reports import LoggingConfig, WandbConfig
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
from megatron_ext.config.task import PRETRAIN, PreferenceTask, PretrainTask, SftTask, TaskConfig
from megatron_ext.config.training import (
    AdamConfig,
    Bf16Precision,
    ExitAt,
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
    "AlertsConfig",
    "Amount",
    "Bf16Precision",
    "CheckpointConfig",
    "ConstantSchedule",
    "CosineSchedule",
    "DataConfig",
    "DataSource",
    "DynamicRopeScaling",
    "EmailConfig",
    "EvaluationConfig",
    "ExitAt",
    "Fp32Precision",
    "Fp8Precision",
    "GatingNormalization",
    "GuardConfig",
    "GumbelNoise",
    "InputJitter",
    "Layout",
    "LearnedNoise",
    "LinearRopeScaling",
    "LinearSchedule",
    "Llama3RopeScaling",
    "LoggingConfig",
    "LoraConfig",
    "LoraTarget",
    "ModelConfig",
    "MultiLatentAttention",
    "ParallelConfig",
    "Position",
    "PRETRAIN",
    "Precision",
    "PreferenceTask",
    "PretrainTask",
    "RecomputeConfig",
    "RollbackConfig",
    "RunConfig",
    "RuntimeConfig",
    "Schedule",
    "SftTask",
    "SpikeConfig",
    "Stage",
    "StagedSource",
    "TaskConfig",
    "TrainConfig",
    "WandbConfig",
    "WatchdogConfig",
    "WebhookConfig",
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
