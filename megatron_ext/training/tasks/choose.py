"""The task that a configuration names."""

from megatron_ext.config import ModelConfig, SftTask, TaskConfig
from megatron_ext.training.tasks.base import TrainTask
from megatron_ext.training.tasks.pretrain import Pretrain
from megatron_ext.training.tasks.sft import Sft


def task_of(task: TaskConfig, model: ModelConfig) -> TrainTask:
    """What `task` asks of a training step of `model`."""
    return Sft.of_task(task, model) if isinstance(task, SftTask) else Pretrain.of(model)
