"""The fields of a model by what they change, read from their tags (effect.py)."""

from typing import Any

from megatron_ext.config.base import fields_of
from megatron_ext.config.effect import Effect, changes_logits, effect_of
from megatron_ext.config.experts import ExpertFields
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.model_training import ExpertTraining

TRAINING_FIELDS = frozenset(n for n, info in fields_of(ModelConfig).items() if effect_of(info) is Effect.TRAINING)
"""Fields that shape neither weights nor function: they may change between runs from one checkpoint."""

OUTSIDE_LOGITS = frozenset(name for name, info in fields_of(ModelConfig).items() if not changes_logits(info))
"""Fields that the logits of a trained model do not depend on: those of training, and the vocabulary's padding."""

EXPERT_FIELDS = frozenset(fields_of(ExpertFields)) | frozenset(fields_of(ExpertTraining))
"""Fields that say something of models with experts alone."""


def is_training_only(value: Any) -> bool:
    """Whether the value of a field is a section that only training reads, such as noise without weights."""
    return hasattr(value, "__pydantic_fields__") and all(
        effect_of(info) is Effect.TRAINING for info in fields_of(type(value)).values()
    )
