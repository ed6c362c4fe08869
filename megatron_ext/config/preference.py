"""What preference optimisation trains of a model: the same weights, without what is drawn or moved beside the loss."""

from dataclasses import replace
from typing import Any

from megatron_ext.config.adapters import LoraConfig
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.task import PreferenceTask, TaskConfig

_OFF: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "moe_expert_capacity_factor": None,
    "moe_pad_expert_input_to_capacity": False,
}
_OF_BALANCE: dict[str, Any] = {"moe_aux_loss_coeff": 0.0, "moe_adaptive_aux_loss": None, "moe_z_loss_coeff": 0.0}


def trained_as(task: TaskConfig, model: ModelConfig) -> ModelConfig:
    """`model` as `task` trains it: both answers of a pair, and their reference, are of one function of the weights.

    What is drawn for a token and what moves a router's bias has weights of its own, and is held still by the routers.
    """
    if not isinstance(task, PreferenceTask):
        return model
    still = replace(model, **_OFF)
    if task.balance_losses:
        return still
    kinds = model.moe_router_load_balancing_type
    off = dict(_OF_BALANCE)
    if isinstance(kinds, list):
        off["moe_aux_loss_coeff"] = [0.0] * len(kinds)
    return replace(still, **off)


def adapters_as(task: TaskConfig, adapters: LoraConfig | None) -> LoraConfig | None:
    """`adapters` as `task` trains them: in preference optimisation without dropout."""
    if adapters is None or not isinstance(task, PreferenceTask):
        return adapters
    return replace(adapters, targets=[replace(target, dropout=0.0) for target in adapters.targets])


def turned_off(task: TaskConfig, model: ModelConfig, adapters: LoraConfig | None) -> list[str]:
    """Keys of the model and of adapters that `task` leaves out of account, for people."""
    if not isinstance(task, PreferenceTask):
        return []
    still = trained_as(task, model)
    names = [name for name in (*_OFF, *_OF_BALANCE) if getattr(still, name) != getattr(model, name)]
    names += ["moe_router_noise"] if model.moe_router_noise is not None else []
    names += ["moe_router_bias_update_rate"] if model.moe_router_enable_expert_bias else []
    found = [f"model.{name}" for name in names]
    dropped = adapters is not None and any(target.dropout for target in adapters.targets)
    return found + (["adapters.targets.N.dropout"] if dropped else [])
