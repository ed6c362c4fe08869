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

TRAINING_ONLY = frozenset(
    "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split attention_softmax_in_fp32 "
    "barrier_with_L1_time batch_p2p_sync deallocate_pipeline_outputs deterministic_mode "
    "distribute_saved_activations hidden_dropout microbatch_group_size_per_vp_stage moe_per_layer_logging "
    "moe_shared_expert_overlap moe_z_loss_coeff num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage "
    "pipeline_model_parallel_layout".split()
)
"""Overrides of megatron-core's fields that leave the logits of a trained model alone."""


def architecture_of(raw: Mapping[str, Any], *, source: str) -> Architecture:
    """The architecture that a Hugging Face config.json names."""
    named = (raw.get("architectures") or [None])[0]
    for architecture in ARCHITECTURES:
        if architecture.hf_class == named:
            return architecture
    known = ", ".join(a.hf_class for a in ARCHITECTURES)
    raise ConversionError(f"{source}: architectures = {raw.get('architectures')!r}; supported: {known}")


def architecture_for(model: ModelConfig) -> tuple[Architecture, str]:
    """The architecture to export `model` as, and a sentence on why.

    Raises:
        ConversionError: none computes what the model computes.
    """
    unknown = sorted(set(model.transformer_overrides) - TRAINING_ONLY)
    if unknown:
        raise ConversionError(
            f"model.transformer_overrides sets {', '.join(unknown)}: no table says what that is in Hugging Face, and "
            "an export could compute something else. If it leaves the logits alone, add it to TRAINING_ONLY in "
            "architectures/registry.py"
        )
    passed_over = []
    for architecture in ARCHITECTURES:
        reason = architecture.unlike(model)
        if reason is None:
            because = f" ({'; '.join(passed_over)})" if passed_over else ", which reproduces the model exactly"
            return architecture, f"{architecture.hf_class}{because}"
        passed_over.append(f"not {architecture.hf_class}: {reason}")
    raise ConversionError(f"no architecture reproduces this model: {'; '.join(passed_over)}")
