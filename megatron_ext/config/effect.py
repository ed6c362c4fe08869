"""What a model field has an effect on, said where the field is: its weights, its function, or only its training.

    hidden_size: int = shapes_weights(ge=1)
    rotary_base: float = shapes_function(default=10000.0, gt=0)
    hidden_dropout: float = training_only(default=0.0, ge=0, lt=1)

Resuming, conversion, upcycling, merging and the rules read these tags (model_fields.py) and keep no lists of names.
"""

from enum import Enum
from typing import Any

from pydantic import Field


class Effect(Enum):
    """What a field has an effect on; weights before function before training."""

    WEIGHTS = "weights"
    """Which weights there are, or their shapes."""
    FUNCTION = "function"
    """What a model with the same weights computes."""
    TRAINING = "training"
    """Only how the weights come about: initialisation, dropout, losses, what is dropped or added while training."""


def shapes_weights(*, logits: bool = True, **constraints: Any) -> Any:
    """A field that decides which weights there are, or their shapes. Takes what `pydantic.Field` takes.

    Args:
        logits: False where the model computes the same all the same (padding).
    """
    return _tagged(Effect.WEIGHTS, logits, constraints)


def shapes_function(**constraints: Any) -> Any:
    """A field that leaves the weights alone and changes what is computed. Takes what `pydantic.Field` takes."""
    return _tagged(Effect.FUNCTION, True, constraints)


def training_only(**constraints: Any) -> Any:
    """A field that a trained model's logits do not depend on. Takes what `pydantic.Field` takes."""
    return _tagged(Effect.TRAINING, False, constraints)


def _tagged(effect: Effect, logits: bool, constraints: dict[str, Any]) -> Any:
    return Field(**constraints, json_schema_extra={"effect": effect.value, "logits": logits})


def effect_of(info: Any) -> Effect | None:
    """The tag of a field, given pydantic's description of it; None where it has none."""
    extra = info.json_schema_extra
    return Effect(extra["effect"]) if isinstance(extra, dict) and "effect" in extra else None


def changes_logits(info: Any) -> bool:
    """Whether a tagged field changes the logits of a trained model."""
    return bool(info.json_schema_extra["logits"])
