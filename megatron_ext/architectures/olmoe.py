"""OLMoE: norms over all queries and keys of a token, every layer has experts: `OlmoeForCausalLM`."""

from megatron_ext.architectures.tables.attention_fields import Activation, Groups, HeadWidth
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.experts import moe_only, routed_experts, stacked_experts
from megatron_ext.architectures.tables.fields import Always, Field, Fixed
from megatron_ext.architectures.tables.llama_shape import QK_NORMS, SIZES, TRUNK
from megatron_ext.architectures.tables.rope import Rope
from megatron_ext.architectures.tables.routing_fields import EveryLayerMoe, ExpertWidth, NormalizedTopK

OLMOE = Architecture(
    name="olmoe",
    hf_class="OlmoeForCausalLM",
    model_type="olmoe",
    config=(
        *SIZES,
        ExpertWidth("intermediate_size"),
        Groups(),
        HeadWidth("derived"),
        Field("max_position_embeddings", "max_position_embeddings", default=4096),
        Field("rms_norm_eps", "layernorm_epsilon", default=1e-5),
        Activation("hidden_act"),
        Always("qk_layernorm", "projection"),
        Fixed("attention_bias", False),
        Fixed("clip_qkv", None),
        Rope(partial=None),
        Field("num_experts", "num_moe_experts", default=64),
        Field("num_experts_per_tok", "moe_router_topk", default=8),
        EveryLayerMoe(),
        NormalizedTopK(),
    ),
    weights=(*TRUNK, *QK_NORMS, *routed_experts()),
    extra_check=moe_only,
    stacked=stacked_experts(),
)
