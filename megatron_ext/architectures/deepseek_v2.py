"""DeepSeek-V2: latent attention, shared and fine-grained experts, groups by best expert: `DeepseekV2ForCausalLM`."""

from megatron_ext.architectures.tables.attention_fields import Activation, LatentAttention, NoGroups
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.experts import moe_only, routed_experts, shared_experts, stacked_experts
from megatron_ext.architectures.tables.fields import ConfigRule, Field, Fixed, Ignored
from megatron_ext.architectures.tables.llama_shape import (
    DENSE_FFN,
    EMBEDDINGS,
    LAYER,
    MEGATRON_LAYER,
    NORMS,
    PROJECTION,
    SIZES,
)
from megatron_ext.architectures.tables.rope import Rope
from megatron_ext.architectures.tables.routing_fields import (
    DeepSeekBalance,
    FirstDense,
    GroupLimited,
    NormalizedTopK,
    Scaling,
    SharedCount,
)
from megatron_ext.architectures.tables.rules import Rename, Rule
from megatron_ext.config import ModelConfig

ATTENTION, MEGATRON_ATTENTION = f"{LAYER}.self_attn", f"{MEGATRON_LAYER}.self_attention"


def _direct(model: ModelConfig, layer: int) -> bool:
    return model.multi_latent_attention is not None and model.multi_latent_attention.q_lora_rank is None


def _through_a_latent(model: ModelConfig, layer: int) -> bool:
    return not _direct(model, layer)


LATENT_CONFIG: tuple[ConfigRule, ...] = (
    *SIZES,
    Field("intermediate_size", "ffn_hidden_size"),
    LatentAttention(),
    Activation("hidden_act"),
    Fixed("attention_bias", False),
    Rope(partial=None),
    # The class makes both from the fields of latent attention.
    Ignored(("head_dim", "qk_head_dim")),
    Field("n_routed_experts", "num_moe_experts", required=True),
    Field("num_experts_per_tok", "moe_router_topk", required=True),
    Field("moe_intermediate_size", "expert_ffn_hidden_size", settable="moe_ffn_hidden_size", required=True),
)
"""What DeepSeek-V2 and V3 have in common."""

LATENT_WEIGHTS: tuple[Rule, ...] = (
    *EMBEDDINGS,
    *NORMS,
    Rename(f"{MEGATRON_ATTENTION}.linear_q_proj.weight", _direct, hf=f"{ATTENTION}.q_proj.weight"),
    Rename(f"{MEGATRON_ATTENTION}.linear_q_down_proj.weight", _through_a_latent, hf=f"{ATTENTION}.q_a_proj.weight"),
    Rename(f"{MEGATRON_ATTENTION}.q_layernorm.weight", _through_a_latent, hf=f"{ATTENTION}.q_a_layernorm.weight"),
    Rename(f"{MEGATRON_ATTENTION}.linear_q_up_proj.weight", _through_a_latent, hf=f"{ATTENTION}.q_b_proj.weight"),
    Rename(f"{MEGATRON_ATTENTION}.linear_kv_down_proj.weight", hf=f"{ATTENTION}.kv_a_proj_with_mqa.weight"),
    Rename(f"{MEGATRON_ATTENTION}.kv_layernorm.weight", hf=f"{ATTENTION}.kv_a_layernorm.weight"),
    Rename(f"{MEGATRON_ATTENTION}.linear_kv_up_proj.weight", hf=f"{ATTENTION}.kv_b_proj.weight"),
    PROJECTION,
    *DENSE_FFN,
    *routed_experts(),
    *shared_experts(f"{LAYER}.mlp.shared_experts"),
)
"""Every tensor of both but V3's bias; Megatron takes rotated dimensions as interleaved pairs too, so all are copied."""


def _no_even_heads(model: ModelConfig) -> str | None:
    if (reason := moe_only(model)) is not None:
        return reason
    uneven = model.hidden_size % model.num_attention_heads
    return "it needs a hidden size that is a multiple of the heads" if uneven else None


DEEPSEEK_V2 = Architecture(
    name="deepseek_v2",
    hf_class="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    config=(
        *LATENT_CONFIG,
        Field("max_position_embeddings", "max_position_embeddings", default=2048),
        NoGroups("num_key_value_heads"),
        Fixed("mlp_bias", False),
        SharedCount(default=2),
        FirstDense(default=0),
        Fixed("scoring_func", "softmax"),
        NormalizedTopK(settable=False),
        Scaling(default=1.0),
        GroupLimited("max", method="group_limited_greedy"),
        DeepSeekBalance(),
    ),
    weights=LATENT_WEIGHTS,
    extra_check=_no_even_heads,
    stacked=stacked_experts(),
)
