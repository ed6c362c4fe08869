"""Every architecture, and the choice of one."""

from collections.abc import Mapping
from typing import Any

from megatron_ext.architectures.deepseek_v1 import DEEPSEEK_V1
from megatron_ext.architectures.deepseek_v2 import DEEPSEEK_V2
from megatron_ext.architectures.deepseek_v3 import DEEPSEEK_V3
from megatron_ext.architectures.gpt2 import GPT2
from megatron_ext.architectures.gpt_neox import GPT_NEOX
from megatron_ext.architectures.gpt_oss import GPT_OSS
from megatron_ext.architectures.llama import LLAMA
from megatron_ext.architectures.mistral import MISTRAL
from megatron_ext.architectures.mixtral import MIXTRAL
from megatron_ext.architectures.olmoe import OLMOE
from megatron_ext.architectures.own import MEGATRON_EXT
from megatron_ext.architectures.qwen2 import QWEN2
from megatron_ext.architectures.qwen2_moe import QWEN2_MOE
from megatron_ext.architectures.qwen3 import QWEN3
from megatron_ext.architectures.qwen3_moe import QWEN3_MOE
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.fields import said
from megatron_ext.architectures.tanuki import TANUKI
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConversionError

ARCHITECTURES: tuple[Architecture, ...] = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GPT2,
    GPT_NEOX,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    OLMOE,
    GPT_OSS,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V1,
    TANUKI,
    MEGATRON_EXT,
)
"""In order of preference: an export takes the first that reproduces the model exactly and needs no foreign code."""


FORMER_NAMES = {"LLaMAForCausalLM": "LlamaForCausalLM"}
"""Names of classes before transformers had them under the later one, still in files of that time."""


def architecture_of(raw: Mapping[str, Any], *, source: str) -> Architecture:
    """The architecture that a Hugging Face config.json names, by its class, or without one by its type.

    Raises:
        ConversionError: there is no table for it, or class and type are not of one model.
    """
    stated = raw.get("architectures")
    if stated is None:
        stated = [a.hf_class for a in ARCHITECTURES if a.model_type == raw.get("model_type")]
    if not isinstance(stated, list) or not all(isinstance(name, str) for name in stated):
        raise ConversionError(f"{source}: {said('architectures', stated)}: expected a list with the name of a class")
    named = FORMER_NAMES.get(stated[0], stated[0]) if stated else None
    architecture = next((a for a in ARCHITECTURES if a.hf_class == named), None)
    if architecture is None:
        named_so = ", ".join(said(name, raw.get(name)) for name in ("architectures", "model_type"))
        raise ConversionError(
            f"{source}: {named_so}; supported: {_known()}. Another class takes one file (CONTRIBUTING.md, Add an "
            "architecture)"
        )
    if (kind := raw.get("model_type", architecture.model_type)) != architecture.model_type:
        raise ConversionError(
            f"{source}: {said('model_type', kind)}, but {named} is of the type {architecture.model_type!r}; "
            "transformers goes by the type, others by the class. If its code is that of the class, write the type "
            "into a copy of config.json"
        )
    return architecture


def architecture_for(model: ModelConfig, hf_class: str | None = None) -> tuple[Architecture, str]:
    """The architecture to export `model` as, and a sentence on why.

    Args:
        hf_class: take this class. Classes whose code is in a public repository are taken only so.

    Raises:
        ConversionError: none computes what the model computes, or the named one does not.
    """
    if unknown := sorted(model.function_overrides):
        raise ConversionError(
            f"model.transformer_overrides sets {', '.join(unknown)}: no table says what that is in Hugging Face, and "
            "an export could compute something else. If it leaves the logits alone, add it to TRAINING_ONLY in "
            "config/transformer_overrides.py"
        )
    if hf_class is not None:
        return _named(model, hf_class)
    architecture = _first(model)
    if architecture is None:
        raise ConversionError(f"no architecture reproduces this model; {_nearest(ARCHITECTURES, model)}")
    if not architecture.code:
        return architecture, f"{architecture.hf_class}, which reproduces the model exactly"
    stock = tuple(a for a in ARCHITECTURES if not a.code)
    return architecture, f"{architecture.hf_class} (transformers has no such model; {_nearest(stock, model)})"


def _first(model: ModelConfig) -> Architecture | None:
    return next((a for a in ARCHITECTURES if a.remote is None and a.why_unsupported(model) is None), None)


def _named(model: ModelConfig, hf_class: str) -> tuple[Architecture, str]:
    architecture = next((a for a in ARCHITECTURES if a.hf_class == hf_class), None)
    if architecture is None:
        raise ConversionError(f"{hf_class} is not known; choose one of {_known()}")
    if (reason := architecture.why_unsupported(model)) is not None:
        first = _first(model)
        other = f"; {first.hf_class} computes it" if first else ""
        raise ConversionError(f"{hf_class} does not compute what this model computes: {reason}{other}")
    code = "" if architecture.remote is None else f"; its code is in {architecture.remote}, which was not run"
    return architecture, f"{hf_class}, as asked{code}"


def _nearest(architectures: tuple[Architecture, ...], model: ModelConfig) -> str:
    """Why not the class that comes closest to `model`: the one that cannot say the fewest of its fields."""
    candidates = [a for a in architectures if a.remote is None]
    related = [a for a in candidates if a.extra_check(model) is None] or candidates
    nearest = min(related, key=lambda a: len(a.unsupported_fields(model)))
    return f"the nearest is {nearest.hf_class}: {nearest.why_unsupported(model)}"


def _known() -> str:
    return ", ".join(a.hf_class for a in ARCHITECTURES)
