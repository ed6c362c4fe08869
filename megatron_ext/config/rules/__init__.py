"""Rules between configuration keys, by what they are about; importing this package registers them all."""

from megatron_ext.config.rules import architecture, backend, overrides, parallel, precision, routing, training
from megatron_ext.config.rules.registry import RULES, violations

__all__ = [
    "RULES",
    "architecture",
    "backend",
    "overrides",
    "parallel",
    "precision",
    "routing",
    "training",
    "violations",
]
