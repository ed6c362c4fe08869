"""The task that a configuration names."""

from megatron_ext.config import LoraConfig, ModelConfig, PreferenceTask, SftTask, TaskConfig
from megatron_ext.runtime.process_groups import Groups
from megatron_ext.training.tasks.base import TrainTask
from megatron_ext.training.tasks.preference import Preference
from megatron_ext.training.tasks.pretrain import Pretrain
from megatron_ext.training.tasks.sft import Sft


def task_of(task: TaskConfig, model: ModelConfig, groups: Groups, adapters: LoraConfig | None = None) -> TrainTask:
    """What `task` asks of a training step of `model`, of which only `adapters` are trained, if any are given."""
    if isinstance(task, PreferenceTask):
        return Preference(task, task.reference_of(has_adapters=adapters is not None), groups.cp)
    return Sft.of_task(task, model) if isinstance(task, SftTask) else Pretrain.of(model)
