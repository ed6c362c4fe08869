"""Qwen1.5-MoE and Qwen2-MoE, with a shared expert behind a gate: `Qwen2MoeForCausalLM`."""

from megatron_ext.architectures.tables.attention_fields import Activation, Groups, HeadWidth
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.experts import (
    MEGATRON_MLP,
    moe_only,
    routed_experts,
    shared_experts,
    stacked_experts,
)
from megatron_ext.architectures.tables.fields import Always, Field
from megatron_ext.architectures.tables.llama_shape import DENSE_FFN, LAYER, QKV, SIZES, TRUNK
from megatron_ext.architectures.tables.rope import Rope
from megatron_ext.architectures.tables.routing_fields import NormalizedTopK, SparseStep
from megatron_ext.architectures.tables.rules import Rename, bias_of, with_qkv_biases, with_shared_experts
from megatron_ext.architectures.tables.window_fields import SlidingWindow
from megatron_ext.config import ModelConfig

POSITIONS = 32768


def _shared_expert_behind_a_gate(model: ModelConfig) -> str | None:
    return moe_only(model) or (None if model.moe_shared_expert_gate else "it has a shared expert behind a gate")


QWEN2_MOE = Architecture(
    name="qwen2_moe",
    hf_class="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    config=(
        *SIZES,
        Field("intermediate_size", "ffn_hidden_size"),
        Groups(default=16),
        HeadWidth(declared=False),
        Field("max_position_embeddings", "max_position_embeddings", default=POSITIONS),
        Field("rms_norm_eps", "layernorm_epsilon", default=1e-6),
        Activation("hidden_act"),
        Field("qkv_bias", "add_qkv_bias", default=True),
        SlidingWindow(window=4096, switch="use_sliding_window", layers=None, reads_types=True),
        Rope(partial=None),
        Field("num_experts", "num_moe_experts", default=60),
        Field("num_experts_per_tok", "moe_router_topk", default=4),
        Field("moe_intermediate_size", "expert_ffn_hidden_size", settable="moe_ffn_hidden_size", default=1408),
        Field(
            "shared_expert_intermediate_size",
            "moe_shared_expert_intermediate_size",
            default=5632,
        ),
        Always("moe_shared_expert_gate", True),
        SparseStep(),
        NormalizedTopK(),
    ),
    weights=(
        *TRUNK,
        bias_of(QKV, with_qkv_biases),
        *DENSE_FFN,
        *routed_experts(),
        *shared_experts(f"{LAYER}.mlp.shared_expert"),
        Rename(
            f"{MEGATRON_MLP}.shared_experts.gate_weight",
            with_shared_experts,
            hf=f"{LAYER}.mlp.shared_expert_gate.weight",
        ),
    ),
    extra_check=_shared_expert_behind_a_gate,
    stacked=stacked_experts(),
)
