"""Every architecture, and the choice of one."""

from collections.abc import Mapping
from typing import Any

from megatron_ext.architectures.base import Architecture
from megatron_ext.architectures.llama import LLAMA
from megatron_ext.architectures.megatron_ext import MEGATRON_EXT
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConversionError

ARCHITECTURES: tuple[Architecture, ...] = (LLAMA, MEGATRON_EXT)
"""In order of preference: an export takes the first that reproduces the model exactly."""


def architecture_of(raw: Mapping[str, Any], *, source: str) -> Architecture:
    """The architecture that a Hugging Face config.json names."""
    named = (raw.get("architectures") or [None])[0]
    for architecture in ARCHITECTURES:
        if architecture.hf_class == named:
            return architecture
    known = ", ".join(a.hf_class for a in ARCHITECTURES)
    raise ConversionError(f"{source}: architectures = {raw.get('architectures')!r}; supported: {known}")


def architecture_for(model: ModelConfig, hf_class: str | None = None) -> tuple[Architecture, str]:
    """The architecture to export `model` as, and a sentence on why.

    Args:
        hf_class: the class that is asked for; None takes the first that reproduces the model.

    Raises:
        ConversionError: none computes what the model computes, or the one asked for does not.
    """
    if unknown := sorted(model.function_overrides):
        raise ConversionError(
            f"model.transformer_overrides sets {', '.join(unknown)}: no table says what that is in Hugging Face, and "
            "an export could compute something else. If it leaves the logits alone, add it to TRAINING_ONLY in "
            "config/model.py"
        )
    if hf_class is not None:
        chosen = next((a for a in ARCHITECTURES if a.hf_class == hf_class), None)
        reason = "unknown class" if chosen is None else chosen.unlike(model)
        if chosen is None or reason is not None:
            raise ConversionError(f"{hf_class} cannot be exported: {reason}")
        return chosen, f"{hf_class}, as asked for"
    passed_over = []
    for architecture in ARCHITECTURES:
        reason = architecture.unlike(model)
        if reason is None:
            because = f" ({'; '.join(passed_over)})" if passed_over else ", which reproduces the model exactly"
            return architecture, f"{architecture.hf_class}{because}"
        passed_over.append(f"not {architecture.hf_class}: {reason}")
    raise ConversionError(f"no architecture reproduces this model: {'; '.join(passed_over)}")
