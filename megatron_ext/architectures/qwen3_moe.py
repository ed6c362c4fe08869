"""Qwen3-MoE: norms of each head's queries and keys, no shared expert: `Qwen3MoeForCausalLM`."""

from megatron_ext.architectures.tables.attention_fields import Activation, Groups, HeadWidth
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.experts import moe_only, routed_experts, stacked_experts
from megatron_ext.architectures.tables.fields import Always, Field, Fixed
from megatron_ext.architectures.tables.llama_shape import DENSE_FFN, QK_NORMS, SIZES, TRUNK
from megatron_ext.architectures.tables.rope import Rope
from megatron_ext.architectures.tables.routing_fields import NormalizedTopK, SparseStep
from megatron_ext.architectures.tables.window_fields import SlidingWindow

POSITIONS = 32768

QWEN3_MOE = Architecture(
    name="qwen3_moe",
    hf_class="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    config=(
        *SIZES,
        Field("intermediate_size", "ffn_hidden_size"),
        Groups(default=4),
        HeadWidth(declared=False),
        Field("max_position_embeddings", "max_position_embeddings", default=POSITIONS),
        Field("rms_norm_eps", "layernorm_epsilon", default=1e-6),
        Activation("hidden_act"),
        Always("qk_layernorm", "head"),
        Fixed("attention_bias", False),
        SlidingWindow(window=4096, switch="use_sliding_window"),
        Rope(partial=None),
        # transformers 5 writes the second name, older readers know the first.
        Field("num_experts", "num_moe_experts", also=("num_local_experts",), default=128),
        Field("num_experts_per_tok", "moe_router_topk", default=8),
        Field("moe_intermediate_size", "expert_ffn_hidden_size", settable="moe_ffn_hidden_size", default=768),
        SparseStep(),
        NormalizedTopK(),
    ),
    weights=(*TRUNK, *QK_NORMS, *DENSE_FFN, *routed_experts()),
    extra_check=moe_only,
    stacked=stacked_experts(),
)
