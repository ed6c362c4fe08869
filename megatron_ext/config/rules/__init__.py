"""Rules between configuration keys, by what they are about; importing this package registers them all."""

from megatron_ext.config.rules import (
    adapters,
    alerts,
    architecture,
    backend,
    checkpoint,
    dispatch,
    guard,
    overrides,
    parallel,
    precision,
    routing,
    schedule,
    stages,
    task,
    training,
)
from megatron_ext.config.rules.registry import RULES, violations
from megatron_ext.config.rules.stages import stage_violations

__all__ = [
    "RULES",
    "alerts",
    "adapters",
    "architecture",
    "backend",
    "checkpoint",
    "dispatch",
    "guard",
    "overrides",
    "parallel",
    "precision",
    "routing",
    "schedule",
    "stage_violations",
    "stages",
    "task",
    "training",
    "violations",
]
