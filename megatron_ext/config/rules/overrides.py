"""Rules of the escape hatch to fields of megatron-core."""

from typing import Any

from megatron_ext.config.base import fields_of
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.rules.registry import rule
from megatron_ext.config.training import RecomputeConfig

OWNED_BY_US = (
    frozenset(fields_of(ModelConfig))
    | frozenset(fields_of(ParallelConfig))
    | {f"recompute_{name}" for name in fields_of(RecomputeConfig)}
    # Follow from precision and from how our loop counts tokens and sends between stages.
    | set("params_dtype pipeline_dtype bf16 calculate_per_token_loss batch_p2p_comm overlap_p2p_comm".split())
    | {"perform_initialization"}
)
"""TransformerConfig fields that this framework derives; an override could contradict them silently."""


@rule("model.transformer_overrides")
def _overrides_stay_in_their_lane(overrides: dict[str, Any]) -> str | None:
    owned = sorted(set(overrides) & OWNED_BY_US)
    return f"{', '.join(owned)}: set through this file's own keys, not as an override" if owned else None
